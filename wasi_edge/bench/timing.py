"""Fair timing on a machine that others use: A B C, A B C ..., after a warm-up, ratios taken within each round.

What the machine does to one of a round it mostly does to its neighbours; a median of ratios of neighbours is steadier
than a ratio of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Seconds of each round, and of the first contestant's same rounds divided by them."""

    seconds: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def median_seconds(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.seconds)

    @property
    def speedup(self) -> float:
        """Median of the pairwise ratios."""
        return statistics.median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """Quartiles of the pairwise ratios (all of it where there are fewer than four)."""
        if len(self.ratios) < 4:
            return min(self.ratios), max(self.ratios)
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return low, high


def interleave(
    works: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 1,
    on_round: Callable[[int], None] = lambda done: None,
) -> dict[str, Timed]:
    """Time each work in turn, `rounds` times over; the first of them is what the others are compared with."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-warm_up, rounds):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
        on_round(number + warm_up + 1)
    first = seconds[next(iter(works))]
    return {
        name: Timed(tuple(taken), tuple(a / b for a, b in zip(first, taken, strict=True)))
        for name, taken in seconds.items()
    }
