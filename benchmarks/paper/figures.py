"""What the scripts of the figures share: results in JSON beside the machine they came from, a table, plots.

Results lie in `benchmarks/paper/results/`, plots in `docs/figures/`; `docs/results.md` shows them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy import study
from benchmarks.accuracy.study import Store, this_machine

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).resolve().parents[2] / "docs" / "figures"
EPSILONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def open_store(figure: str) -> Store:
    """The runs of a figure done so far."""
    return Store(figure, this_machine(), RESULTS)


def write_table(figure: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
    """The figure's table: printed, and written to `results/<figure>-table.json`."""
    study.write_table(figure, rows, note, RESULTS)


def write_plot(name: str, svg: str) -> None:
    """A plot that stands alone: a white ground, and dark ink on it whatever the page around it."""
    FIGURES.mkdir(exist_ok=True)
    alone = re.sub(r'style="width:100%', 'style="background:#fff;color:#1d2226;width:100%', svg, count=1)
    (FIGURES / f"{name}.svg").write_text(alone + "\n")
