"""`wasi-edge convert`: a dense checkpoint into factors, inside a memory budget."""

from __future__ import annotations

import enum
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.cli.info import parameter_counts
from wasi_edge.cli.options import budget_from, require, require_empty
from wasi_edge.errors import NoUsableData, UsageError

if TYPE_CHECKING:
    from wasi_edge.conversion.sources import DenseSource

_DEFAULT_EPSILON = 0.8


class StoredType(enum.StrEnum):
    """How the tensors are stored."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder or file of Hugging Face, timm or torchvision, hf:OWNER/NAME, or our own model.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the result, new or empty.")],
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="How many weights are kept: those that hold this share of each layer's energy.",
            show_default="0.8, or the model's own",
        ),
    ] = None,
    dtype: Annotated[StoredType, typer.Option(help="How the tensors are stored.")] = StoredType.FLOAT32,
    calibrate: Annotated[
        Path | None, typer.Option(help="Folder of photos like those the model is for; sorted or not.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Memory of the whole process, e.g. 512MB.", show_default="512MB or half of what is free"),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Input size in pixels.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Convert the dense model SOURCE into low-rank factors in OUT."""
    require("--epsilon", epsilon, epsilon is None or 0 < epsilon <= 1, "above 0 and at most 1")
    require_empty(out, "empty this one")
    from wasi_edge.conversion.sources import open_source
    from wasi_edge.models.locate import resolve_source

    with open_source(resolve_source(source)) as dense:
        size = dense.preprocessing.image_size if image_size is None else image_size
        dense.geometry.tokens(size)  # refuses a size that the patches do not divide
        kept = _epsilon(source, dense, epsilon)
        if calibrate is not None and dense.config is not None and dense.config.epsilon == kept:
            console.say(
                f"{source} is in factors at epsilon {kept:g} already, and calibrating brings nothing back of what was "
                "cut away: fine-tune it, take a lower --epsilon, or convert the dense checkpoint"
            )
        result = _carry_out(dense, out, kept, dtype, size, calibrate, budget_from(budget), threads)
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.cli.info import for_people
    from wasi_edge.report.terminal import info_table

    console.stdout_console().print(info_table(for_people(result)))


def _epsilon(source: str, dense: DenseSource, wanted: float | None) -> float:
    """The epsilon to convert at. Raises UsageError for one that the source has lost already."""
    own = None if dense.config is None else dense.config.epsilon
    if wanted is None:
        return _DEFAULT_EPSILON if own is None else own
    if own is not None and wanted > own:
        raise UsageError(
            f"--epsilon {wanted:g} is above the {own:g} that {source} was truncated at, and what was cut "
            f"away is gone: take at most {own:g}, or convert the dense checkpoint"
        )
    return wanted


def _carry_out(
    dense: DenseSource,
    out: Path,
    epsilon: float,
    dtype: StoredType,
    image_size: int,
    calibrate: Path | None,
    budget_bytes: int,
    threads: int | None,
) -> dict[str, Any]:
    """Plan, convert, and describe the result; OUT is as it was if that fails."""
    from wasi_edge.conversion.budget import calibration_photos, decode_allowance
    from wasi_edge.inference.predict import iter_photos

    found = [] if calibrate is None else list(iter_photos([calibrate]))
    if calibrate is not None and not found:
        raise NoUsableData(f"--calibrate {calibrate}: no photos found")
    count = calibration_photos(dense.geometry, image_size, len(found), budget_bytes)
    console.prepare_torch(threads)
    from wasi_edge.artefact import TENSORS_NAME
    from wasi_edge.conversion.calibration import CalibrationPhotos
    from wasi_edge.conversion.convert import Calibration, Settings
    from wasi_edge.conversion.convert import convert as convert_source
    from wasi_edge.memory.libraries import release_library_pages
    from wasi_edge.memory.process import read_memory

    release_library_pages()
    calibration, photos = None, None
    if count:
        allowance = decode_allowance(dense.geometry, image_size, count, budget_bytes)
        photos = CalibrationPhotos(found, count, dense.preprocessing.with_image_size(image_size), allowance)
        calibration = Calibration(count, photos.read)
        console.say(f"calibrating on {count} of {len(found)} photos")
    existed = out.exists()
    try:
        with console.progress_bar("blocks") as progress:
            settings = Settings(epsilon, dtype.value, image_size)
            config = convert_source(dense, out, settings, calibration, on_progress=progress)
    except BaseException:
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    skipped = {} if photos is None else photos.skipped
    for path, reason in skipped.items():
        console.say(f"{path}: {reason}")
    return {
        "status": "completed",
        "out": str(out),
        "name": config.name,
        "epsilon": epsilon,
        "dtype": dtype.value,
        "image_size": image_size,
        "calibration_photos": count,
        "ranks": dict(config.linears),
        **parameter_counts(config),
        "file_bytes": (out / TENSORS_NAME).stat().st_size,
        "budget_bytes": budget_bytes,
        "peak_rss_bytes": read_memory().peak_rss_bytes,
        "skipped_files": [{"path": str(path), "reason": reason} for path, reason in skipped.items()],
    }
