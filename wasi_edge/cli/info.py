"""`wasi-edge info`: what is in a model folder, from its configuration alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.units import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wasi_edge.artefact import ModelConfig
    from wasi_edge.models.geometry_swin import Geometry
    from wasi_edge.preprocessing import Preprocessing


def info(
    model: Annotated[str, typer.Argument(help="A run, a model folder, a checkpoint of another library, or 'default'.")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Describe MODEL: sizes, ranks, labels, preprocessing, origin, and what training it would take."""
    from wasi_edge.models.locate import resolve_source

    result = describe(resolve_source(model))
    if as_json:
        console.print_json(result)
        return
    from wasi_edge.report.terminal import info_table

    console.stdout_console().print(info_table(for_people(result)))


def describe(folder: Path) -> dict[str, Any]:
    """Everything `info --json` prints. Raises ArtefactError or ConversionError for a damaged folder."""
    from wasi_edge.artefact import TENSORS_NAME, is_artefact, open_artefact

    if not is_artefact(folder):
        return _describe_foreign(folder)
    with open_artefact(folder) as artefact:
        config = artefact.config
    return {
        "folder": str(folder),
        "kind": "factored" if config.has_factors else "dense",
        "name": config.name,
        "architecture": config.architecture,
        "schema_version": config.schema_version,
        "geometry": config.geometry.to_dict(),
        "epsilon": config.epsilon,
        "dtype": config.dtype,
        **parameter_counts(config),
        "file_bytes": (folder / TENSORS_NAME).stat().st_size,
        "ranks": dict(config.linears),
        "training_memory": _training_memory(config.geometry, config.preprocessing, config),
        "labels": config.labels,
        "preprocessing": config.preprocessing.to_dict(),
        "provenance": dict(config.provenance),
        "training": None if config.training is None else dict(config.training),
    }


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """`dense_parameters` of the network, and `stored_parameters` in its factors."""
    dense = config.geometry.tensor_shapes({}, config.num_classes)
    return {
        "dense_parameters": sum(math.prod(shape) for shape in dense.values()),
        "stored_parameters": sum(math.prod(shape) for shape in config.tensor_shapes().values()),
    }


def _describe_foreign(folder: Path) -> dict[str, Any]:
    """A checkpoint of another library: what a conversion would read."""
    from wasi_edge.conversion.checkpoint_files import PICKLE_SUFFIXES
    from wasi_edge.conversion.sources import open_source

    inside = list(folder.iterdir()) if folder.is_dir() else [folder]
    files = [path for path in inside if path.suffix == ".safetensors"]
    files = files or [path for path in inside if path.suffix in PICKLE_SUFFIXES]
    with open_source(folder) as source:
        parameters = sum(math.prod(shape) for shape in source.tensor_shapes.values())
        labels = [] if source.id2label is None else [source.id2label[i] for i in sorted(source.id2label)]
        return {
            "folder": str(folder),
            "kind": f"{source.provenance['format']}, dense",
            "name": source.name,
            "geometry": source.geometry.to_dict(),
            "epsilon": None,
            "dense_parameters": parameters,
            "stored_parameters": parameters,
            "file_bytes": sum(path.stat().st_size for path in files),
            "ranks": dict.fromkeys(source.geometry.linear_shapes()),
            "training_memory": _training_memory(source.geometry, source.preprocessing, None),
            "labels": labels,
            "preprocessing": source.preprocessing.to_dict(),
            "provenance": dict(source.provenance),
            "training": None,
        }


def _training_memory(
    geometry: Geometry, preprocessing: Preprocessing, config: ModelConfig | None
) -> list[dict[str, Any]]:
    """What training would take under common budgets; of what is converted first (a checkpoint of another library, or a
    dense model that no epsilon made), at the ranks that epsilon 0.8 usually gives."""
    from wasi_edge.bench.synthetic import synthetic_ranks
    from wasi_edge.planner.outlook import outlook

    ranks: Mapping[str, int | None] = synthetic_ranks(geometry)
    if config is not None and (config.epsilon is not None or config.has_factors):
        ranks = config.linears
    return outlook(geometry, preprocessing.image_size, ranks, preprocessing.resize_side)


def for_people(result: dict[str, Any]) -> dict[str, Any]:
    """The same without nulls, the ranks in one line for each kind of layer."""
    shown = {
        key: value for key, value in result.items() if value is not None and key not in ("ranks", "training_memory")
    }
    for row in result.get("training_memory", []):
        shown[f"training in {format_size(row['budget_bytes'])}"] = _outlook_text(row, result["geometry"])
    shown["stored share"] = f"{100 * result['stored_parameters'] / result['dense_parameters']:.0f} % of the parameters"
    for key in ("dense_parameters", "stored_parameters"):
        shown[key] = f"{result[key]:,}"
    kinds: dict[str, list[str]] = {}
    for name, rank in result["ranks"].items():
        kinds.setdefault(name.rpartition(".")[2], []).append("dense" if rank is None else str(rank))
    shown["rank by block"] = {
        kind: ranks[0] if len(set(ranks)) == 1 else " ".join(ranks) for kind, ranks in kinds.items()
    }
    return shown


def _outlook_text(row: dict[str, Any], geometry: dict[str, Any]) -> str:
    if "peak_bytes" not in row:
        return f"too small, {format_size(row['smallest_budget_bytes'])} would do"
    depth = geometry.get("depth") or sum(geometry["depths"])
    blocks = f"the last {row['trained_blocks']} of {depth} blocks"
    at_once = "a photo at a time" if row["micro_batch"] == 1 else f"{row['micro_batch']} photos at a time"
    rank = "" if row["gradient_rank"] >= 32 else f", gradients of rank {row['gradient_rank']}"
    return f"about {format_size(row['peak_bytes'])}: {blocks}, {at_once}{rank}"
