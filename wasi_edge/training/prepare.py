"""Everything before torch is imported: the photos' headers, the model's shape, the measured base, the plan.

Nothing is written here. `--dry-run` ends after this module; so does a budget that cannot be kept.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from wasi_edge.artefact import ModelConfig, is_artefact, read_config
from wasi_edge.conversion.budget import FEWEST_PHOTOS, conversion_bytes
from wasi_edge.conversion.sources import open_source
from wasi_edge.data.folder import PhotoFolder, scan_folder
from wasi_edge.errors import UnreadablePhoto, UsageError
from wasi_edge.memory.malloc import settle_threads
from wasi_edge.memory.pages import can_drop_pages
from wasi_edge.memory.process import read_memory
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.geometry_swin import Geometry
from wasi_edge.models.locate import resolve_model
from wasi_edge.planner.choices import CACHED_VIEWS, usual_blocks
from wasi_edge.planner.memory import cached_bytes_per_photo
from wasi_edge.planner.plan import Base, Plan, Speed, Work, choose_plan
from wasi_edge.planner.workload import Workload
from wasi_edge.preprocess import open_photo, shrink
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.training import defaults
from wasi_edge.training.probe import run_probe
from wasi_edge.training.request import Events, FinetuneRequest

# importing twice does not take the same memory to the page
_START_SLACK_BYTES = 4 * 2**20
# pages of what shows the progress, which the measured child does not have
_OWN_FILE_BYTES = 2 * 2**20
_TIMED_PHOTOS = 3
# what checkpoints and the result may need
_SPARE_DISK_BYTES = 2**30
_TIMED_DECODE_BYTES = 64 * 2**20
# at which a dense checkpoint is converted where nobody says another
DEFAULT_EPSILON = 0.8
# so many of the linears that stay dense are named
_NAMED_LINEARS = 4


@dataclass(frozen=True)
class ModelChoice:
    """The network to start from. `config` is None for a foreign dense checkpoint; `is_run`: trained by us before.

    `convert_epsilon` is set where the checkpoint must be factored (or truncated further) before training.
    """

    folder: Path
    name: str
    geometry: Geometry
    preprocessing: Preprocessing
    config: ModelConfig | None
    is_run: bool
    epsilon: float | None
    convert_epsilon: float | None


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to start. `ranks`: of each linear, None where dense."""

    request: FinetuneRequest
    model: ModelChoice
    folder: PhotoFolder
    labels: tuple[str, ...]
    base: Base
    plan: Plan
    work: Work
    ranks: dict[str, int | None]
    threads: int


def prepare(request: FinetuneRequest, events: Events, stop_wanted: Callable[[], bool] = lambda: False) -> Prepared:
    """Scan, measure and plan. Raises BudgetInfeasible, NoUsableData, UsageError, ArtefactError, or Interrupted once
    `stop_wanted`."""
    threads = settle_threads(request.threads)
    model = choose_model(request)
    folder = scan_folder(request.photos, min_classes=1 if model.is_run else 2, min_side=model.preprocessing.resize_side)
    labels = class_labels(model, folder.classes)
    work = _work(request, folder, model.geometry)
    for note in _notes(request, model, labels, folder, work):
        events.message(note)
    ranks = _known_ranks(request, model)
    probe = run_probe(
        model.geometry,
        model.preprocessing.image_size,
        request.method,
        work.gradient_rank,
        work.optimizer,
        ranks,
        str(model.folder),
        model.convert_epsilon,
        request.budget_bytes - read_memory().rss_bytes,
        stop_wanted,
    )
    ranks = ranks if ranks is not None else probe.ranks
    assert ranks is not None
    load = Workload(
        geometry=model.geometry,
        image_size=model.preprocessing.image_size,
        ranks=ranks,
        num_classes=len(labels),
        method=request.method,
        augment_photo_bytes=3 * 2 * model.preprocessing.resize_side**2,
        lora_rank=defaults.LORA_RANK if request.method is Method.LORA else 0,
        lends=can_drop_pages(),
        optimizer=work.optimizer,
    )
    speed = Speed(
        probe.train_seconds, probe.infer_seconds, probe.update_seconds, _decode_seconds(folder, model) / threads
    )
    own = read_memory()
    start = own.rss_bytes + max(probe.peak_bytes, probe.import_bytes) + _START_SLACK_BYTES
    # pages of libraries leave when training begins, this command's own too, and come back as far as they are used
    files = min(probe.file_bytes + _OWN_FILE_BYTES, own.file_bytes + probe.file_bytes)
    base = Base(start=start, steady=own.rss_bytes - own.file_bytes + probe.heap_bytes + files)
    if model.convert_epsilon is not None:
        fewest = min(work.num_train, FEWEST_PHOTOS)
        converting = conversion_bytes(model.geometry, load.image_size, fewest, base.steady)
        base = dataclasses.replace(base, start=max(base.start, converting))
    work = dataclasses.replace(work, cached_views=_views_with_disk(load, work, request.out))
    plan = choose_plan(load, work, base, request.budget_bytes, speed)
    for note in _sacrifices(work, plan):
        events.message(note)
    events.planned(plan.to_dict(), request.budget_bytes, plan.peak_bytes, plan.seconds)
    return Prepared(request, model, folder, labels, base, plan, work, ranks, threads)


def choose_model(request: FinetuneRequest) -> ModelChoice:
    """Look at the model's configuration, not at its weights."""
    folder = resolve_model(request.model)
    if is_artefact(folder):
        config = read_config(folder)
        name, geometry, preprocessing = config.name, config.geometry, config.preprocessing
    else:
        config = None
        if not any(folder.glob("*.safetensors")):
            # reading one takes torch, whose memory is measured before it may be here
            raise UsageError(f"{folder} holds no .safetensors: convert it first, wasi-edge convert {folder} OUT")
        with open_source(folder) as source:
            name, geometry, preprocessing = source.name, source.geometry, source.preprocessing
    if request.image_size is not None:
        geometry.tokens(request.image_size)  # refuses a size the patches do not divide, naming its neighbours
        preprocessing = preprocessing.with_image_size(request.image_size)
    own = None if config is None else config.epsilon
    epsilon = request.epsilon if request.epsilon is not None else own
    convert: float | None = None
    if request.epsilon is not None and own is not None and request.epsilon > own:
        raise UsageError(
            f"--epsilon {request.epsilon:g} is above the {own:g} that {folder} was truncated at, and what was cut away "
            f"is gone: leave --epsilon out, or start from the dense checkpoint"
        )
    # an artefact of fixed ranks has factors and no epsilon; one of a high epsilon may have no factors
    has_factors = config is not None and config.has_factors
    if request.method.has_factors and (epsilon is not None or not has_factors):
        if own is None:
            epsilon = convert = DEFAULT_EPSILON if epsilon is None else epsilon
        elif epsilon is not None and epsilon < own:
            convert = epsilon
    return ModelChoice(
        folder=folder,
        name=name,
        geometry=geometry,
        preprocessing=preprocessing,
        config=config,
        is_run=config is not None and config.training is not None,
        epsilon=epsilon if request.method.has_factors or config is not None else None,
        convert_epsilon=convert,
    )


def class_labels(model: ModelChoice, found: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of the result: an earlier run's keep their places, new ones follow in alphabetical order."""
    old = tuple(model.config.labels) if model.is_run and model.config is not None else ()
    return old + tuple(label for label in found if label not in old)


def _known_ranks(request: FinetuneRequest, model: ModelChoice) -> dict[str, int | None] | None:
    """Rank of each linear of the run; None where it depends on singular values nobody has seen yet."""
    shapes = model.geometry.linear_shapes()
    if request.method.has_dense_weights or (request.method is Method.HEAD and model.config is None):
        return dict.fromkeys(shapes)
    if model.convert_epsilon is not None:
        return None
    assert model.config is not None
    return {name: model.config.linears[name] for name in shapes}


def _work(request: FinetuneRequest, folder: PhotoFolder, geometry: Geometry) -> Work:
    parts = Counter(photo.part for photo in folder.photos)
    if parts["val"]:
        num_val, num_train = parts["val"], parts["train"]
    else:
        num_val = round(len(folder.photos) * request.val_split)
        num_train = len(folder.photos) - num_val
    explicit = {
        "--train-blocks": request.train_blocks,
        "--rank": request.gradient_rank,
        "--optimizer": request.optimizer,
    }
    for flag, value in explicit.items():
        if value is not None and not request.method.is_explicit:
            raise UsageError(f"{flag} is for --method wasi, wsi and asi; {request.method} has no say in it")
    blocks = usual_blocks(request.method, geometry.depth, defaults.TRAINED_SHARE)
    if request.train_blocks is not None:
        if request.train_blocks > geometry.depth:
            raise UsageError(f"--train-blocks {request.train_blocks}: the model has {geometry.depth} blocks")
        blocks = request.train_blocks
    batch = min(request.batch or defaults.BATCH, max(num_train, 1))
    work = Work(
        num_train=num_train,
        num_val=num_val,
        epochs=request.epochs or defaults.epochs(request.method, request.quality, num_train, batch),
        batch=batch,
        gradient_rank=request.gradient_rank or defaults.GRADIENT_RANK,
        blocks=blocks,
        blocks_named=request.train_blocks is not None,
    )
    usual = defaults.optimizer(request.method, work.steps, may_be_cut_short=request.max_seconds is not None)
    return dataclasses.replace(work, optimizer=request.optimizer or usual)


def _views_with_disk(load: Workload, work: Work, out: Path) -> int:
    """Augmented views of each photo whose pass through frozen blocks has room on the disk of `out`, 0 if none has."""
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    # tokens of an earlier attempt are overwritten, decoded photos are still to come
    own = sum(path.stat().st_size for path in (out / "checkpoint" / "frozen").glob("*.bin"))
    decoded = (work.num_train + work.num_val) * load.augment_photo_bytes
    free = shutil.disk_usage(existing).free + own - decoded - _SPARE_DISK_BYTES
    per_photo = cached_bytes_per_photo(load)
    views = (free // per_photo - work.num_val - work.num_train) // max(1, work.num_train)
    return max(0, min(CACHED_VIEWS, views))


def _sacrifices(work: Work, plan: Plan) -> list[str]:
    """What the budget costs beside time."""
    notes = []
    if 0 < plan.trained_blocks < work.blocks:
        notes.append(
            f"the budget has room to train the last {plan.trained_blocks} blocks instead of {work.blocks}; the others "
            f"stay as they are"
        )
    if 0 < plan.gradient_rank < work.gradient_rank:
        notes.append(f"the budget has room for gradients of rank {plan.gradient_rank} instead of {work.gradient_rank}")
    return notes


def _decode_seconds(folder: PhotoFolder, model: ModelChoice) -> float:
    """Seconds to decode and shrink a photo: the mean of a few that are cheap to hold."""
    light = [photo for photo in folder.photos if photo.header.decode_bytes < _TIMED_DECODE_BYTES]
    step = max(1, len(light) // _TIMED_PHOTOS)
    chosen = light[::step][:_TIMED_PHOTOS]
    began = time.perf_counter()
    for photo in chosen:
        try:
            shrink(open_photo(photo.path, model.preprocessing.resize_side), model.preprocessing)
        except UnreadablePhoto:
            continue
    return (time.perf_counter() - began) / max(1, len(chosen))


def _notes(
    request: FinetuneRequest, model: ModelChoice, labels: tuple[str, ...], folder: PhotoFolder, work: Work
) -> list[str]:
    """Sentences about what this run does that is not obvious from the command."""
    notes = []
    if request.method.has_dense_weights and model.config is not None and model.config.has_factors:
        notes.append(f"--method {request.method} multiplies the factors of {model.name} out to dense weights")
    if request.method.has_factors and model.convert_epsilon is not None:
        notes.append(
            f"{model.name} is converted first, at epsilon {model.convert_epsilon:g}, calibrated on your photos"
        )
    elif request.method.has_factors and model.config is not None:
        notes += _notes_on_dense(model.config)
    if work.optimizer is Optimizer.SGD and request.optimizer is None:
        notes.append(f"{work.steps:,} steps: SGD, which ends ahead in runs as long as this (else --optimizer polar)")
    if model.is_run:
        new = [label for label in folder.classes if model.config and label not in model.config.labels]
        absent = [label for label in labels if label not in folder.classes]
        notes.append(
            f"continuing {os.fspath(model.folder)}: {len(new)} new classes"
            + (f" ({', '.join(new)})" if new else "")
            + (f"; no photos now of {', '.join(absent)}, which keep their labels" if absent else "")
        )
    return notes


def _notes_on_dense(config: ModelConfig) -> list[str]:
    """That linears stay dense, and how they would come to have factors."""
    dense = [name for name, rank in config.linears.items() if rank is None]
    if not dense:
        return []
    named = ", ".join(dense[:_NAMED_LINEARS]) + (", ..." if len(dense) > _NAMED_LINEARS else "")
    lower = config.epsilon is None or config.epsilon > DEFAULT_EPSILON
    remedy = f"--epsilon {DEFAULT_EPSILON:g}" if lower else f"an --epsilon below {config.epsilon:g}"
    return [
        f"{len(dense)} of {len(config.linears)} linears are stored dense and are trained dense: {named}; "
        f"{remedy} would put all linears in factors, fitted to your photos"
    ]


def with_plan(prepared: Prepared, plan: Plan) -> Prepared:
    """The same run under another plan (that of the checkpoint it resumes from)."""
    return dataclasses.replace(prepared, plan=plan)


def with_ranks(prepared: Prepared, ranks: Mapping[str, int | None]) -> Prepared:
    """The same run with the ranks that its conversion chose: as many parameters as planned, elsewhere."""
    return dataclasses.replace(prepared, ranks={name: ranks[name] for name in prepared.ranks})
