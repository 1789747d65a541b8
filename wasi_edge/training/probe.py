"""What torch costs on this machine, measured by a short child process: memory and time.

The planner needs to know, before torch is imported here, what the process will hold once it is, which ranks a dense
checkpoint will get, and how long a step takes. A child imports torch, measures one block of the very network, says so
as one line of JSON and exits; it never exists at the same time as the run's own torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wasi_edge.children import python_command
from wasi_edge.errors import Interrupted, WasiEdgeError, reason_of_end
from wasi_edge.memory.process import ProcessMemory
from wasi_edge.method import Method, Optimizer
from wasi_edge.models.geometry import BlockShape
from wasi_edge.models.geometry_swin import Geometry, geometry_from_dict
from wasi_edge.training.defaults import LORA_RANK

_PHOTOS = 4
_ENOUGH_SECONDS = 0.7
_POLL_SECONDS = 0.1
# products and a decomposition that make the libraries take the buffers they keep
_WARM_UP_SIZE, _WARM_UP_DECOMPOSITION = 1024, 384


@dataclass(frozen=True)
class ProbeResult:
    """What the child found.

    peak_bytes      the most the child itself held: it lives beside this process, and the budget is for both
    import_bytes    what a process holds more just after importing torch
    heap_bytes      what torch adds to anonymous memory for the rest of a run: its heap and buffers
    file_bytes      pages of libraries that a process holds while steps run, those it had before torch included
    *_seconds       per photo; `update_seconds` per optimiser step
    ranks           of the linears, where they were asked for
    """

    peak_bytes: int
    import_bytes: int
    heap_bytes: int
    file_bytes: int
    train_seconds: float
    infer_seconds: float
    update_seconds: float
    ranks: dict[str, int | None] | None


def run_probe(
    geometry: Geometry,
    image_size: int,
    method: str,
    gradient_rank: int,
    optimizer: str,
    ranks: Mapping[str, int | None] | None,
    source: str | None,
    epsilon: float | None,
    available_bytes: int,
    stop_wanted: Callable[[], bool] = lambda: False,
) -> ProbeResult:
    """Measure in a child process. With `ranks` None they are computed from the checkpoint `source` at `epsilon`.

    Where torch alone takes more than `available_bytes` nothing will be run and the times are not measured well.

    Raises WasiEdgeError with the child's message if it fails, Interrupted once `stop_wanted`.
    """
    question = {
        "architecture": geometry.architecture,
        "geometry": geometry.to_dict(),
        "image_size": image_size,
        "method": method,
        "gradient_rank": gradient_rank,
        "optimizer": optimizer,
        "ranks": None if ranks is None else dict(ranks),
        "source": source,
        "epsilon": epsilon,
        "available_bytes": available_bytes,
    }
    output, complaints, status = _run_child(json.dumps(question), stop_wanted)
    try:
        answer = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError):
        detail = reason_of_end(status) if status < 0 else (complaints.strip().splitlines() or ["no output"])[-1]
        raise WasiEdgeError(f"torch could not be measured on this machine: {detail}") from None
    if "error" in answer:
        raise WasiEdgeError(answer["error"])
    return ProbeResult(**answer)


def _run_child(question: str, stop_wanted: Callable[[], bool]) -> tuple[str, str, int]:
    """What the child writes to stdout and stderr, and its return code. In a session of its own, a Ctrl-C reaches this
    process alone."""
    child = subprocess.Popen(
        python_command("-m", "wasi_edge.training.probe"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )
    unsent: str | None = question
    try:
        while not stop_wanted():
            try:
                return *child.communicate(unsent, timeout=_POLL_SECONDS), child.returncode
            except subprocess.TimeoutExpired:
                unsent = None  # what was sent and read so far is remembered
        raise Interrupted("stopped before anything was begun")
    finally:
        if child.poll() is None:
            child.kill()
            child.communicate()


def _main() -> int:
    """The child: one JSON question on stdin, one JSON answer on stdout."""
    question = json.load(sys.stdin)
    # what the run has imported too before torch, so that the difference is torch's alone
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401

    from wasi_edge.memory.malloc import settle_threads, tune_malloc
    from wasi_edge.memory.process import read_memory

    tune_malloc()
    threads = settle_threads(None)
    before = read_memory()
    try:
        print(json.dumps(_measure(question, threads, before)))
    except WasiEdgeError as error:
        print(json.dumps({"error": str(error)}))
    return 0


def _measure(question: dict[str, Any], threads: int, before: ProcessMemory) -> dict[str, Any]:
    import torch

    from wasi_edge.layers.linear import LinearKinds
    from wasi_edge.memory.libraries import release_library_pages
    from wasi_edge.memory.malloc import reuse_freed_memory
    from wasi_edge.memory.process import read_memory
    from wasi_edge.training import session  # noqa: F401  (what the run imports is part of its base)

    torch.set_num_threads(threads)
    import_bytes = read_memory().rss_bytes - before.rss_bytes
    release_library_pages()
    geometry = geometry_from_dict(question["architecture"], question["geometry"])
    shapes = geometry.block_shapes(question["image_size"])
    _warm_up(_PHOTOS * shapes[0].tokens, shapes[0].width, shapes[0].mlp_width)
    warm = read_memory()
    method = Method(question["method"])
    reuse_freed_memory(any_size=not method.is_explicit)  # as the run does after its first step
    ranks = question["ranks"] or _ranks(question)
    enough_seconds = _ENOUGH_SECONDS if import_bytes <= question["available_bytes"] else 0.0
    infer = _infer_block(geometry, question["image_size"], ranks, enough_seconds)
    train, update = 0.0, 0.0
    if method.is_explicit:
        train, update = _train_block(
            geometry,
            question["image_size"],
            ranks,
            LinearKinds.of(method),
            question["gradient_rank"],
            Optimizer(question["optimizer"]),
            enough_seconds,
        )
    elif method is not Method.HEAD:
        rank = LORA_RANK if method is Method.LORA else None
        train, update = _train_autograd_block(geometry, question["image_size"], rank, enough_seconds)
    return {
        "peak_bytes": read_memory().peak_rss_bytes,
        "import_bytes": import_bytes,
        # the heap before the block was there, the libraries after everything has been used
        "heap_bytes": warm.rss_bytes - warm.file_bytes - (before.rss_bytes - before.file_bytes),
        "file_bytes": read_memory().file_bytes,
        "train_seconds": geometry.depth * train / _PHOTOS,
        "infer_seconds": geometry.depth * infer / _PHOTOS,
        "update_seconds": geometry.depth * update,
        "ranks": ranks if question["ranks"] is None else None,
    }


def _warm_up(tokens: int, width: int, mlp_width: int) -> None:
    """Use the kinds of products there will be, at sizes like theirs: the buffers for packing depend on them."""
    import torch

    square = torch.ones(_WARM_UP_SIZE, _WARM_UP_SIZE)
    torch.mm(square, square, out=torch.empty_like(square))
    tall, out = torch.ones(tokens, width), torch.empty(tokens, mlp_width)
    torch.mm(tall, torch.ones(mlp_width, width).t(), out=out)
    torch.mm(out, torch.ones(mlp_width, width), out=tall)
    torch.mm(out.t(), tall)
    symmetric = square[:_WARM_UP_DECOMPOSITION, :_WARM_UP_DECOMPOSITION].double()
    torch.mm(symmetric, symmetric)
    torch.linalg.eigh(symmetric)


def _ranks(question: dict[str, Any]) -> dict[str, int | None]:
    from wasi_edge.conversion.convert import Settings, choose_ranks
    from wasi_edge.conversion.sources import open_source

    with open_source(question["source"]) as source:
        return choose_ranks(source, Settings(epsilon=question["epsilon"], always_factor=True))


def _middle_block(geometry: Geometry, image_size: int) -> tuple[int, BlockShape]:
    """A block of the network's middle that takes tokens as they are: its number and shape."""
    shapes = geometry.block_shapes(image_size)
    index = next(index for index in range(geometry.depth // 2, -1, -1) if not shapes[index].merged)
    return index, shapes[index]


def _random_block(geometry: Geometry, image_size: int, ranks: Mapping[str, int | None], kinds: Any = None) -> Any:
    """A block of the network's middle with random weights."""
    import torch

    from wasi_edge.layers.linear import PLAIN_KINDS
    from wasi_edge.models.network import build_block

    index, _ = _middle_block(geometry, image_size)
    shapes = geometry.tensor_shapes(ranks, None)
    generator = torch.Generator().manual_seed(0)

    def read(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator).mul_(0.02)

    return build_block(geometry, index, ranks, read, image_size, kinds or PLAIN_KINDS)


def _infer_block(geometry: Geometry, image_size: int, ranks: Mapping[str, int | None], enough_seconds: float) -> float:
    import torch

    from wasi_edge.layers.saving import Pass

    block, run = _random_block(geometry, image_size, ranks), Pass()
    _, shape = _middle_block(geometry, image_size)
    x = torch.randn(_PHOTOS, shape.tokens, shape.width, generator=torch.Generator().manual_seed(1))
    return _median_seconds(lambda: block.forward(x, run, None), enough_seconds)


def _train_block(
    geometry: Geometry,
    image_size: int,
    ranks: Mapping[str, int | None],
    kinds: Any,
    gradient_rank: int,
    optimizer: Optimizer,
    enough_seconds: float,
) -> tuple[float, float]:
    """Seconds of forward and backward of one block for four photos, and of the update of its weights."""
    import torch

    from wasi_edge.chunks import TURNS
    from wasi_edge.keep import COMPACT
    from wasi_edge.layers.saving import Pass
    from wasi_edge.training.factor_update import FactorUpdate

    block, run = _random_block(geometry, image_size, ranks, kinds), Pass(refresh_basis=True)
    _, shape = _middle_block(geometry, image_size)
    generator = torch.Generator().manual_seed(1)
    for linear in block.linears.values():
        linear.start_training(gradient_rank, shape.tokens, generator)
    x = torch.randn(_PHOTOS, shape.tokens, shape.width, generator=generator)
    latest: dict[str, Any] = {}

    def both() -> None:
        y, saved = block.forward(x, run, COMPACT)
        _, gradients = block.backward(saved, y.clone(), run)
        latest.update(gradients)

    seconds = _median_seconds(both, enough_seconds)
    rule = FactorUpdate(block.linears, 0.0, turns=TURNS, optimizer=optimizer)

    def updates() -> None:
        for step in range(1, TURNS + 1):
            for name in block.linears:
                rule.update(name, latest[f"{name}.projected"].clone(), 1e-6, step)

    return seconds, _median_seconds(updates, enough_seconds) / TURNS


def _train_autograd_block(
    geometry: Geometry, image_size: int, lora_rank: int | None, enough_seconds: float
) -> tuple[float, float]:
    """The same for a dense block under autograd and torch's AdamW, all of it or its low-rank updates alone."""
    import torch

    from wasi_edge.models.lora import is_update, lora_block
    from wasi_edge.models.vanilla import new_block

    index, shape = _middle_block(geometry, image_size)
    block: torch.nn.Module = new_block(geometry, index, image_size)
    if lora_rank is not None:
        block = lora_block(geometry, index, image_size, lora_rank)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if is_update(name):
                parameter.zero_()
            parameter.requires_grad_(lora_rank is None or is_update(name))
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=1e-6)
    x = torch.randn(_PHOTOS, shape.tokens, shape.width).requires_grad_()

    def both() -> None:
        block(x).square().mean().backward()

    seconds = _median_seconds(both, enough_seconds)
    return seconds, _median_seconds(optimizer.step, enough_seconds)


def _median_seconds(work: Callable[[], object], enough_seconds: float) -> float:
    """Median time of a call after two for warming up: three calls, and more for `enough_seconds`."""
    work()
    work()
    times: list[float] = []
    end = time.monotonic() + enough_seconds
    while len(times) < 3 or (time.monotonic() < end and len(times) < 50):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    code = _main()
    sys.stdout.flush()
    # not by way of the interpreter's end: taking the libraries apart brings pages back that were just measured as gone
    os._exit(code)
