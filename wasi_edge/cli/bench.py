"""`wasi-edge bench`: how fast and how small each method is on this machine, beside plain training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from wasi_edge.cli import console
from wasi_edge.cli.options import require, require_empty
from wasi_edge.errors import UsageError
from wasi_edge.units import parse_size

Number = TypeVar("Number", int, float)
_ALL = "vanilla,vanilla+checkpoint,lora,head,wsi,asi,wasi"
_QUICK = "vanilla,lora,wasi"


def bench(
    model: Annotated[
        str, typer.Option(help="A model folder, 'default', or a geometry such as vit_base_patch16_224.")
    ] = "default",
    methods: Annotated[
        str | None,
        typer.Option(
            help="Of vanilla, vanilla+checkpoint, lora, head, wsi, asi, wasi, wasi@512MB.", show_default="all"
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Photos per optimiser step, or several: 1,8,16.")] = "8",
    epsilon: Annotated[str, typer.Option(help="Share of energy kept, or several: 0.8,0.6.")] = "0.8",
    rank: Annotated[int, typer.Option(min=1, help="Rank of the gradients.")] = 32,
    budget: Annotated[str | None, typer.Option(help="Adds wasi within this memory, e.g. 512MB.")] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Input size in pixels.")] = None,
    photos: Annotated[
        Path | None, typer.Option(help="Folder with one folder of photos per class, to measure the gradient error on.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Interleaved training steps.", show_default="5")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first impression, in under two minutes.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the synthetic weights and pixels.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and report.html.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")] = False,
) -> None:
    """Measure speed, memory and gradient error of the methods, interleaved, against plain training."""
    epsilons = _numbers("--epsilon", epsilon, float)
    for value in epsilons:
        require("--epsilon", value, 0 < value <= 1, "above 0 and at most 1")
    batches = _numbers("--batch", batch, int)
    for size in batches:
        require("--batch", size, size >= 1, "at least 1")
    names = methods or (_QUICK if quick else _ALL)
    if budget is not None:
        parse_size(budget)
        names += f",wasi@{budget}"
    if out is not None:
        require_empty(out, "choose another one", allowed=False)
    from wasi_edge.memory.malloc import settle_threads

    threads = settle_threads(threads)  # the allocator is left as everybody has it
    from wasi_edge.atomic import write_json_atomic
    from wasi_edge.bench.contestant import parse_methods
    from wasi_edge.bench.run import BenchRequest
    from wasi_edge.bench.run import bench as measure
    from wasi_edge.cli.progress import RichEvents
    from wasi_edge.report.bench_html import render_bench_report
    from wasi_edge.report.bench_table import bench_sentences, bench_table
    from wasi_edge.report.page import write_page

    request = BenchRequest(
        model=model,
        entries=tuple(parse_methods(names, epsilons)),
        batches=batches,
        epsilons=epsilons,
        gradient_rank=rank,
        rounds=rounds or (2 if quick else 5),
        threads=threads,
        seed=seed,
        quick=quick,
        image_size=image_size,
        photos=photos,
    )
    screen = console.stderr_console()
    with RichEvents(screen, None) as events:
        result = measure(request, events)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomic(out / "bench.json", result)
        write_page(out / "report.html", render_bench_report(result))
    if as_json:
        console.print_json(result)
        return
    stdout = console.stdout_console()
    stdout.print(bench_table(result))
    for sentence in bench_sentences(result):
        stdout.print(sentence)
    if out is not None:
        stdout.print(f"report: {out / 'report.html'}")


def _numbers(option: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    """The numbers of a comma-separated list. Raises UsageError."""
    try:
        return tuple(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        example = "8,16" if kind is int else "0.8,0.6"
        raise UsageError(f"{option} {text}: expected one number, or several such as {example}") from None
