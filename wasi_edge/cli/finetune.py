"""`wasi-edge finetune`: photos in class folders -> a model of their own."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from wasi_edge.cli import console
from wasi_edge.cli.options import budget_from, require, require_empty
from wasi_edge.errors import Interrupted, WasiEdgeError
from wasi_edge.method import Method, Optimizer, Quality
from wasi_edge.training.request import FinetuneRequest
from wasi_edge.units import parse_duration

_RUN = re.compile(r"wasi-run-(\d+)")
_EXIT_CODES = {"interrupted": Interrupted.exit_code, "failed": WasiEdgeError.exit_code}


def finetune(
    photos: Annotated[Path, typer.Argument(metavar="PHOTOS", help="Folder with one folder of photos per class.")],
    model: Annotated[
        str, typer.Option(help="'default', a model or Hugging Face folder, or an earlier run to go on from.")
    ] = "default",
    budget: Annotated[
        str | None,
        typer.Option(help="Memory of the whole process, e.g. 512MB.", show_default="512MB or half of what is free"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result.", show_default="./wasi-run-N, the first free N")
    ] = None,
    quality: Annotated[Quality, typer.Option(help="How thoroughly: minutes against accuracy.")] = Quality.DEFAULT,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Most passes over the photos.", show_default="by quality and number of photos"),
    ] = None,
    max_time: Annotated[str | None, typer.Option(help="Be done by then, e.g. 20m or 1h30m.")] = None,
    epsilon: Annotated[
        float | None,
        typer.Option(
            help="How many weights are kept: those that hold this share of each layer's energy.",
            show_default="the model's own, else 0.8",
        ),
    ] = None,
    method: Annotated[Method, typer.Option(help="How to train.")] = Method.WASI,
    val_split: Annotated[float, typer.Option(help="Share of the photos held back to test on.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another split and order.")] = 0,
    image_size: Annotated[int | None, typer.Option(min=8, help="Input size in pixels.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Photos per optimiser step.", show_default="16")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the last layers.", show_default="the method's own")
    ] = None,
    train_blocks: Annotated[
        int | None,
        typer.Option(
            min=1, help="Train the last N blocks alone.", show_default="half of them, or as many as fit the budget"
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Directions of its inputs that a layer learns from in a step.", show_default="32"),
    ] = None,
    optimizer: Annotated[
        Optimizer | None,
        typer.Option(help="By which rule layers move.", show_default="sgd for 1,000 steps and more, else polar"),
    ] = None,
    max_temp: Annotated[float | None, typer.Option(help="Pause above this CPU temperature, Celsius.")] = None,
    nice: Annotated[int | None, typer.Option(min=0, max=19, help="Give way to other programs: 0 to 19.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    checkpoint_every: Annotated[str, typer.Option(help="Time between checkpoints.")] = "60s",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT where it stopped.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and its minutes, and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The report as JSON on standard output.")] = False,
) -> None:
    """Fine-tune a model on PHOTOS, inside a memory budget."""
    require("--epsilon", epsilon, epsilon is None or 0 < epsilon <= 1, "above 0 and at most 1")
    require("--val-split", val_split, 0 <= val_split < 1, "at least 0 and below 1")
    require("--lr", lr, lr is None or 0 < lr < math.inf, "above 0")
    request = FinetuneRequest(
        photos=photos,
        out=_choose_out(out, resume, dry_run),
        budget_bytes=budget_from(budget),
        model=model,
        method=method,
        quality=quality,
        epochs=epochs,
        max_seconds=None if max_time is None else parse_duration(max_time),
        epsilon=epsilon,
        val_split=val_split,
        seed=seed,
        image_size=image_size,
        batch=batch,
        learning_rate=lr,
        train_blocks=train_blocks,
        gradient_rank=rank,
        optimizer=optimizer,
        max_temperature=max_temp,
        nice=nice,
        threads=threads,
        resume=resume,
        checkpoint_seconds=parse_duration(checkpoint_every),
    )
    if nice is not None:
        os.nice(nice)
    report = _carry_out(request, dry_run)
    if as_json:
        console.print_json(report)
    if code := _EXIT_CODES.get(str(report.get("status")), 0):
        raise typer.Exit(code)


def _carry_out(request: FinetuneRequest, dry_run: bool) -> dict[str, Any]:
    """Plan or run, with everything that is to be seen on stderr."""
    from wasi_edge.cli.progress import RichEvents
    from wasi_edge.report.terminal import summary
    from wasi_edge.training import run

    screen = console.stderr_console()
    with RichEvents(screen, request.budget_bytes) as events:
        report = run.plan_run(request, events) if dry_run else run.finetune(request, events)
    screen.print(summary(report, os.fspath(request.out)))
    return report


def _choose_out(out: Path | None, resume: bool, dry_run: bool) -> Path:
    """The folder to write to. Raises UsageError if it holds something and nobody said --resume."""
    if out is None:
        return _run_to_resume() if resume else _first_free_run()
    require_empty(out, "go on with the run in it with --resume", allowed=resume or dry_run)
    return out


def _runs() -> dict[int, Path]:
    """Folders ./wasi-run-N by N."""
    found = {}
    for path in Path().iterdir():
        if (match := _RUN.fullmatch(path.name)) is not None:
            found[int(match[1])] = path
    return found


def _first_free_run() -> Path:
    taken = _runs()
    return Path(f"wasi-run-{next(n for n in range(1, len(taken) + 2) if n not in taken)}")


def _run_to_resume() -> Path:
    """`--resume` without `--out`: the last run that stopped too early, else the last one, else a new one."""
    runs = [path for _, path in sorted(_runs().items(), reverse=True)]
    unfinished = [path for path in runs if (path / "checkpoint").is_dir() and not _is_finished(path)]
    return next(iter(unfinished + runs), Path("wasi-run-1"))


def _is_finished(run: Path) -> bool:
    try:
        report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("status") in ("completed", "early_stopped")
