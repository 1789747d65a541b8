"""The whole of `wasi-edge bench`: what is measured, in which order, and the result as plain JSON values.

For each batch size all methods are built, timed interleaved (training steps, then forward passes), and let go; then the
peak memory of each is taken in a fresh process. FLOP bounds, gradient errors and parameter counts stand beside.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wasi_edge.bench.contestant import Contestant, Entry, free_choices
from wasi_edge.bench.cost_model import POINTS, measure_cost_model
from wasi_edge.bench.flops import paper_count, step_flops
from wasi_edge.bench.gradient import BATCH, HEAD_PHOTOS, WARM_UP, Sample, gradient_errors, load_sample
from wasi_edge.bench.peak import measure_peak
from wasi_edge.bench.subject import CLASSES, Subject, find_subject
from wasi_edge.bench.timing import Timed, interleave
from wasi_edge.errors import UsageError
from wasi_edge.layers.linear import LinearKinds
from wasi_edge.memory.hardware import governor, hardware, power_watts, temperature_celsius, throttled, versions
from wasi_edge.memory.process import read_memory
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.network import build_network
from wasi_edge.planner.choices import Choices
from wasi_edge.planner.plan import Base, Speed, Work, choose_plan
from wasi_edge.planner.workload import Workload
from wasi_edge.training.defaults import LORA_RANK
from wasi_edge.training.probe import run_probe
from wasi_edge.training.request import Events

_UPKEEP_ROUNDS = 3
_POWER_SECONDS = 0.2
# batches that warm up the bases, and batches that are compared
# (of the latter an even number: all linears have their turn as often)
_GRADIENT_BATCHES = WARM_UP, 4
_QUICK_GRADIENT_BATCHES = 2, 2


@dataclass(frozen=True)
class BenchRequest:
    """One `wasi-edge bench` command.

    photos      class folders for the gradient error; None: it is not measured
    rounds      of interleaved training steps; forward passes take twice as many
    """

    model: str
    entries: tuple[Entry, ...]
    batches: tuple[int, ...]
    epsilons: tuple[float, ...]
    gradient_rank: int
    rounds: int
    threads: int
    seed: int
    quick: bool
    image_size: int | None = None
    photos: Path | None = None


def bench(request: BenchRequest, events: Events) -> dict[str, Any]:
    """Measure; the result is what `bench --json` prints."""
    torch.set_num_threads(request.threads)
    torch.set_grad_enabled(False)
    subject = find_subject(request.model, request.image_size)
    _check(request, subject)
    before = _condition()
    errors = _gradient_errors(request, subject, events)
    results = []
    for batch in request.batches:
        results += _measure_batch(request, subject, batch, errors, events)
    cost_model = None
    if not request.quick:
        events.stage("cost model", len(POINTS))
        cost_model = measure_cost_model(request.gradient_rank, request.seed, events.advance)
    return {
        "status": "completed",
        "hardware": {**hardware(), "threads": request.threads, "before": before, "after": _condition()},
        "versions": versions(),
        "settings": {
            "model": request.model,
            "image_size": subject.image_size,
            "tokens": subject.geometry.tokens(subject.image_size),
            "batches": list(request.batches),
            "epsilons": list(request.epsilons),
            "methods": [entry.name for entry in request.entries],
            "rank": request.gradient_rank,
            "threads": request.threads,
            "rounds": request.rounds,
            "quick": request.quick,
            "seed": request.seed,
        },
        "results": results,
        "cost_model": cost_model,
    }


def _check(request: BenchRequest, subject: Subject) -> None:
    """Everything that can be wrong with the request, before anything takes time."""
    for entry in request.entries:
        subject.ranks(entry.epsilon)
    if request.photos is not None and subject.is_synthetic:
        raise UsageError("--photos: gradients of synthetic weights on photos mean nothing; leave it out")


def _gradient_errors(
    request: BenchRequest, subject: Subject, events: Events
) -> dict[tuple[Method, float | None], tuple[float, dict[str, float]]]:
    """By method and epsilon, of those whose gradients are compressed; nothing without photos."""
    if request.photos is None:
        return {}
    warm_up, batches = _QUICK_GRADIENT_BATCHES if request.quick else _GRADIENT_BATCHES
    sample = load_sample(request.photos, subject.preprocessing, HEAD_PHOTOS + (warm_up + batches) * BATCH)
    if len(sample.batches(batches, warm_up)) <= warm_up:
        raise UsageError(f"--photos: too few photos in {request.photos}, {2 * (warm_up + 1) * BATCH} are needed")
    wanted = {(entry.method, entry.epsilon) for entry in request.entries if entry.method.is_explicit}
    found = {}
    events.stage("gradient error", len(wanted))
    for done, (method, epsilon) in enumerate(sorted(wanted, key=str), start=1):
        found[method, epsilon] = _error_of(subject, method, epsilon, request.gradient_rank, sample, batches, warm_up)
        events.advance(done)
    return found


def _error_of(
    subject: Subject, method: Method, epsilon: float | None, rank: int, sample: Sample, batches: int, warm_up: int
) -> tuple[float, dict[str, float]]:
    def build() -> Any:
        kinds, ranks = LinearKinds.of(method), subject.ranks(epsilon)
        read = subject.reader(epsilon)
        return build_network(subject.geometry, ranks, read, subject.image_size, head=False, kinds=kinds)

    return gradient_errors(build, rank, sample, batches, warm_up)


def _measure_batch(
    request: BenchRequest,
    subject: Subject,
    batch: int,
    errors: dict[tuple[Method, float | None], tuple[float, dict[str, float]]],
    events: Events,
) -> list[dict[str, Any]]:
    chosen = {_key(entry): _choices(request, subject, entry, batch) for entry in request.entries}
    events.stage(f"building, batch {batch}", len(request.entries))
    contestants = {}
    for done, entry in enumerate(request.entries, start=1):
        contestants[_key(entry)] = Contestant(subject, entry, chosen[_key(entry)], batch, request.seed)
        events.advance(done)
    events.stage(f"training steps, batch {batch}", request.rounds + 1)
    train = interleave({key: c.step for key, c in contestants.items()}, request.rounds, on_round=events.advance)
    events.stage(f"forward passes, batch {batch}", 2 * request.rounds + 1)
    infer = interleave({key: c.infer for key, c in contestants.items()}, 2 * request.rounds, on_round=events.advance)
    upkeep_rounds = 1 if request.quick else _UPKEEP_ROUNDS
    upkeep = {key: c.upkeep_fraction(upkeep_rounds) for key, c in contestants.items()}
    copies = {key: c.window_copies_fraction(upkeep_rounds) for key, c in contestants.items()}
    watts = {key: _watts(c) for key, c in contestants.items()}
    counts = {key: c.counts() for key, c in contestants.items()}
    contestants.clear()
    gc.collect()
    rows = []
    events.stage(f"memory, batch {batch}", len(request.entries))
    for done, entry in enumerate(request.entries, start=1):
        key = _key(entry)
        question = {
            "model": request.model,
            "image_size": subject.image_size,
            "entry": dataclasses.asdict(entry),
            "choices": chosen[key].choices(),
            "batch": batch,
            "seed": request.seed,
            "threads": request.threads,
        }
        row = _row(request, subject, entry, batch, train[key], infer[key])
        error, by_kind = errors.get((entry.method, entry.epsilon), (None, None))
        is_planned, power = entry.budget_bytes is not None, watts[key]
        row |= {
            "upkeep_fraction": upkeep[key],
            "window_copies_fraction": copies[key],
            "gradient_error": error,
            "gradient_error_by_kind": by_kind,
            "peak_rss_bytes": measure_peak(question),
            "trainable_parameters": counts[key][0],
            "stored_parameters": counts[key][1],
            "watts": power,
            "joules_per_image": None if power is None else power * train[key].median_seconds / batch,
            "plan": chosen[key].choices() if is_planned else None,
        }
        rows.append(row)
        events.advance(done)
    return rows


def _row(
    request: BenchRequest, subject: Subject, entry: Entry, batch: int, train: Timed, infer: Timed
) -> dict[str, Any]:
    """What follows from times and shapes."""
    geometry, size, ranks = subject.geometry, subject.image_size, subject.ranks(entry.epsilon)
    lora = LORA_RANK if entry.method is Method.LORA else 0
    flops = step_flops(geometry, size, ranks, entry.method, request.gradient_rank, batch, entry.is_checkpointed, lora)
    vanilla = step_flops(geometry, size, subject.ranks(None), Method.VANILLA, 0, batch)
    return {
        "method": entry.name,
        "model": subject.name,
        "batch": batch,
        "epsilon": entry.epsilon,
        "rank": request.gradient_rank if entry.method.is_explicit else (lora or None),
        "train_ms_per_image": 1e3 * train.median_seconds / batch,
        "infer_ms_per_image": 1e3 * infer.median_seconds / batch,
        "train_speedup": train.speedup,
        "infer_speedup": infer.speedup,
        "train_speedup_spread": list(train.spread),
        "infer_speedup_spread": list(infer.spread),
        "train_bound": vanilla.train / (flops.train + flops.upkeep),
        "infer_bound": vanilla.infer / flops.infer,
        "ranks": {name: rank for name, rank in ranks.items() if rank is not None},
        "synthetic": subject.is_synthetic,
        "samples": len(train.seconds),
        "flops": dataclasses.asdict(flops),
        "paper": paper_count(geometry, size, ranks, entry.method, request.gradient_rank, batch),
    }


def _choices(request: BenchRequest, subject: Subject, entry: Entry, batch: int) -> Choices:
    """All it likes, or what the planner chooses within the entry's budget. Raises BudgetInfeasible."""
    depth = subject.geometry.depth
    if entry.budget_bytes is None:
        return free_choices(batch, depth, request.gradient_rank)
    ranks = subject.ranks(entry.epsilon)
    before = read_memory()
    probe = run_probe(
        subject.geometry,
        subject.image_size,
        entry.method,
        request.gradient_rank,
        Optimizer.POLAR,
        ranks,
        None,
        None,
        entry.budget_bytes,
    )
    load = Workload(
        geometry=subject.geometry,
        image_size=subject.image_size,
        ranks=ranks,
        num_classes=CLASSES,
        method=entry.method,
        augment_photo_bytes=0,
    )
    # the fresh process that is measured has torch from the start: its base is the probe's alone
    own = min(before.rss_bytes, probe.import_bytes // 8)
    base = Base(start=0, steady=own + probe.heap_bytes + probe.file_bytes)
    work = Work(
        num_train=100 * batch,
        num_val=0,
        epochs=1,
        batch=batch,
        gradient_rank=request.gradient_rank,
        blocks=depth,
        blocks_named=True,
    )
    speed = Speed(probe.train_seconds, probe.infer_seconds, probe.update_seconds, 0.0)
    return choose_plan(load, work, base, entry.budget_bytes, speed)


def _watts(contestant: Contestant) -> float | None:
    """Mean power while it trains, where the machine can say (a Raspberry Pi 5's PMIC)."""
    if power_watts() is None:
        return None
    readings: list[float | None] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(_POWER_SECONDS):
            readings.append(power_watts())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    for _ in range(2):
        contestant.step()
    over.set()
    sampler.join()
    known = [reading for reading in readings if reading is not None]
    return statistics.fmean(known) if known else None


def _condition() -> dict[str, Any]:
    """How hot and how throttled the machine is now."""
    firmware = throttled()
    return {
        "temperature_celsius": temperature_celsius(),
        "throttled": None if firmware is None else firmware["raw"],
        "governor": governor(),
    }


def _key(entry: Entry) -> str:
    return entry.name if entry.epsilon is None else f"{entry.name} {entry.epsilon:g}"
