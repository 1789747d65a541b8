"""Fig. 2: what the formulas promise of one linear layer over widths and ranks, beside what is measured.

python -m benchmarks.paper.fig2_dimensions

A square layer (D, D) with inputs (16, 197, D), in factors of a share of D. Predicted, dense over WASI: memory and
FLOPs as the paper counts them (multiply-adds doubled), where every mode of the inputs has the same share, and as our
engine works, where the last mode alone is compressed to 32. Measured: bytes of the tensors of weight and saved input
(without the padding of ranks and the optimiser's state, which the paper does not count either), and the time of
forward, backward, gradient and update, dense and ours alternating.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.study import Job
from benchmarks.paper import formulas
from benchmarks.paper.figures import open_store, write_plot, write_table
from wasi_edge.chunks import TURNS
from wasi_edge.layers.linear import WasiLinear
from wasi_edge.layers.saving import Pass
from wasi_edge.report.svg import Series, line_chart
from wasi_edge.training.factor_update import FactorUpdate

WIDTHS, SHARES = (192, 384, 768, 1152), (0.1, 0.2, 0.3, 0.4, 0.47)
BATCH, TOKENS, GRADIENT_RANK, ROUNDS, RATE = 16, 197, 32, 9, 1e-4


def main() -> None:
    """Measure what is missing, then draw."""
    torch.set_grad_enabled(False)
    store = open_store("fig2")
    points = [(width, share) for width in WIDTHS for share in SHARES]
    jobs = {point: Job(f"width {point[0]}", f"share {point[1]}", 0, partial(_measure, *point)) for point in points}
    store.run(jobs.values())
    rows = [{"width": point[0], "share": point[1], **store.runs[job.key]} for point, job in jobs.items()]
    write_table("fig2", rows, f"inputs ({BATCH}, {TOKENS}, width), gradient rank {GRADIENT_RANK}")
    for quantity, label in (("memory", "memory"), ("train", "training"), ("infer", "inference")):
        curves = [
            Series(f"{width}, {kind}", SHARES, [r[f"{quantity}_{kind}"] for r in rows if r["width"] == width])
            for width in (WIDTHS[1], WIDTHS[-1])
            for kind in ("paper", "ours", "measured")
        ]
        write_plot(f"fig2-{quantity}", line_chart(curves, "rank / width", f"{label}, dense / WASI"))


def _measure(width: int, share: float) -> dict[str, Any]:
    rank = round(share * width)
    generator = torch.Generator().manual_seed(width)
    x, dy = (torch.randn(BATCH * TOKENS, width, generator=generator) for _ in range(2))
    weight = torch.randn(width, width, generator=generator) / width**0.5
    bias = torch.zeros(width)
    ours = _Ours(weight, bias, rank, generator)
    y = torch.empty_like(dy)
    dense = {"train": lambda: _dense_steps(weight, bias, x, dy, y), "infer": lambda: _dense_forward(weight, bias, x, y)}
    factored = {
        "train": lambda: ours.steps(x, dy, y),
        "infer": lambda: ours.linear.forward(x, TOKENS, ours.run, None, y),
    }
    layer = formulas.Layer(BATCH, TOKENS, width, width)
    modes = (round(share * BATCH), round(share * TOKENS), rank)
    vanilla = formulas.dense(layer)
    return {
        "rank": rank,
        **{f"{key}_paper": value for key, value in formulas.paper(layer, rank, modes).gain(vanilla).items()},
        **{f"{key}_ours": value for key, value in formulas.ours(layer, rank, GRADIENT_RANK).gain(vanilla).items()},
        "memory_measured": (weight.nbytes + x.nbytes) / ours.held_bytes(x),
        **{f"{kind}_measured": _paired_ratio(dense[kind], factored[kind]) for kind in ("train", "infer")},
    }


class _Ours:
    """A WASI layer and its update."""

    def __init__(self, weight: Tensor, bias: Tensor, rank: int, generator: torch.Generator) -> None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        self.linear = WasiLinear(left[:, :rank].contiguous(), (values[:rank, None] * right[:rank]).contiguous(), bias)
        self.linear.start_training(GRADIENT_RANK, TOKENS, generator)
        self._update = FactorUpdate({"linear": self.linear}, weight_decay=0.0, turns=TURNS)
        self.run, self._steps = Pass(), 0

    def forward(self, x: Tensor, y: Tensor) -> None:
        """Inference."""
        self.linear.forward(x, TOKENS, self.run, None, y)

    def steps(self, x: Tensor, dy: Tensor, y: Tensor) -> None:
        """Forward, backward and update, as often as linears take turns: in one of them this one has its turn."""
        for _ in range(TURNS):
            self._steps += 1
            self.run.refresh_basis = True
            _, saved = self.linear.forward(x, TOKENS, self.run, "input", y)
            assert saved is not None
            _, grads = self.linear.backward(saved, dy, TOKENS, self.run, y)
            self._update.update("linear", grads["projected"], RATE, self._steps)
            self.linear.params["bias"].sub_(grads["bias"], alpha=RATE)

    def held_bytes(self, x: Tensor) -> int:
        """Of the factors and of what a forward pass keeps of x, its basis included."""
        _, saved = self.linear.forward(x, TOKENS, self.run, "input")
        assert saved is not None and self.linear.basis is not None
        factors = self.linear.params["left"].numel() + self.linear.params["right"].numel()
        return 4 * factors + saved.nbytes + self.linear.basis.nbytes


def _dense_forward(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> None:
    torch.addmm(bias, x, weight.t(), out=y)


def _dense_steps(weight: Tensor, bias: Tensor, x: Tensor, dy: Tensor, y: Tensor) -> None:
    for _ in range(TURNS):
        _dense_forward(weight, bias, x, y)
        torch.mm(dy, weight, out=y)
        weight.addmm_(dy.t(), x, alpha=-1e-12)
        bias.sub_(dy.sum(0), alpha=1e-12)


def _paired_ratio(dense: Callable[[], Any], factored: Callable[[], Any]) -> float:
    """Median of the ratios of neighbouring times."""
    ratios = []
    for number in range(ROUNDS + 1):
        times = []
        for work in (dense, factored):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        if number:  # the first round warms up
            ratios.append(times[0] / times[1])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
