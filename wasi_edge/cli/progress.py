"""A run on the screen: a bar with the time left and the memory beside its budget, a line for each epoch.

Where stderr is no terminal (cron, nohup, a log file) there is no bar: one line for each kind of stage and for
each epoch, so that a run of an hour leaves a page, not a megabyte.

The time left is for the whole run: the plan's estimate at first, and from the first epoch on the speed that
this run really has.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from wasi_edge.cli.console import is_lively
from wasi_edge.memory.hardware import temperature_celsius, throttled
from wasi_edge.memory.process import total_memory
from wasi_edge.report.svg import finite, printable
from wasi_edge.report.terminal import plan_table
from wasi_edge.report.words import percent
from wasi_edge.units import format_duration, format_size

_BAR_WIDTH = 16
_FIRMWARE_SECONDS = 10.0


class RemainingTime:
    """How long the whole run will go on, from its plan and from the epochs it has finished."""

    def __init__(self) -> None:
        self._end: float | None = None
        self._epochs: float | None = None
        self._first: tuple[float, float] | None = None  # (epoch, seconds since the run began)

    def planned(self, epochs: float | None, seconds: float) -> None:
        """The plan says so many seconds from now."""
        self._epochs, self._end = epochs, time.monotonic() + seconds

    def epoch(self, entry: Mapping[str, Any]) -> None:
        """An epoch is done; two of them give a speed."""
        epoch, seconds = finite(entry.get("epoch")), finite(entry.get("seconds"))
        if epoch is None or seconds is None:
            return
        if self._first is None:
            self._first = (epoch, seconds)
        elif self._epochs is not None and epoch > self._first[0]:
            pace = (seconds - self._first[1]) / (epoch - self._first[0])
            self._end = time.monotonic() + pace * (self._epochs - epoch)

    def text(self) -> str:
        """ "about 4.5 min left", or nothing where it is not known or over."""
        left = 0.0 if self._end is None else self._end - time.monotonic()
        return f"about {format_duration(left)} left" if left > 0 else ""


class Heat:
    """How hot a Raspberry Pi is and whether it slows down for that; nothing on other machines."""

    def __init__(
        self,
        temperature: Callable[[], float | None] = temperature_celsius,
        throttling: Callable[[], dict[str, Any] | None] = throttled,
    ) -> None:
        self._temperature, self._throttling = temperature, throttling
        self._looked_at, self._state = -math.inf, throttling()

    def text(self) -> str:
        """ "61 °C", with what the firmware does about it now."""
        if self._state is None:
            return ""
        if time.monotonic() - self._looked_at >= _FIRMWARE_SECONDS:  # asking it starts a process
            self._looked_at, self._state = time.monotonic(), self._throttling() or self._state
        degrees = self._temperature()
        return ", ".join([*([] if degrees is None else [f"{degrees:.0f} °C"]), *self._state["now"]])


class _Live(ProgressColumn):
    """Memory of the run beside its budget, if it has one, heat, and the time left; looked up once a second."""

    max_refresh = 1.0

    def __init__(self, budget_bytes: int | None, remaining: RemainingTime) -> None:
        super().__init__()
        self._budget_bytes, self._remaining, self._heat = budget_bytes, remaining, Heat()

    def render(self, task: Task) -> Text:
        """For every task the same."""
        used = total_memory()
        if self._budget_bytes is None:
            return Text(f"{used / 2**20:.0f} MB")
        memory = f"{used / 2**20:.0f}/{format_size(self._budget_bytes)}"
        parts = (self._heat.text(), self._remaining.text())
        return Text.assemble(
            (memory, "red" if used > self._budget_bytes else ""), *(f"  {part}" for part in parts if part)
        )


class RichEvents:
    """`training.request.Events` on a console. A context manager: leaving it takes the bar away.

    A terminal that has gone (a closed SSH session) must not end a run that is about to save: from the first write that
    fails on, nothing more is written.
    """

    def __init__(self, console: Console, budget_bytes: int | None) -> None:
        self._console = console
        self._remaining = RemainingTime()
        self._task: TaskID | None = None
        self._announced: set[str] = set()
        self._progress: Progress | None = None
        if is_lively(console):
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(_BAR_WIDTH),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                _Live(budget_bytes, self._remaining),
                console=console,
                transient=True,
                refresh_per_second=2,
            )

    def __enter__(self) -> RichEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            with self._unless_gone():
                self._progress.stop()

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._progress, self._task = None, None
            self._console.quiet = True

    def message(self, text: str) -> None:
        """One sentence, above the bar."""
        with self._unless_gone():
            self._console.print(Text(printable(text)))

    def planned(self, plan: dict[str, Any], budget_bytes: int, peak_bytes: int, seconds: float) -> None:
        """The plan as a table."""
        self._remaining.planned(finite(plan.get("epochs")), seconds)
        with self._unless_gone():
            self._console.print(plan_table(plan, budget_bytes, peak_bytes, seconds))

    def stage(self, name: str, total: int) -> None:
        """A new bar, or one line the first time that such a stage begins."""
        name = printable(name)
        if self._progress is None:
            kind = re.sub(r"\d+", "", name)
            if kind not in self._announced:
                self._announced.add(kind)
                self.message(f"{name} ({total})")
            return
        with self._unless_gone():
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(name, total=total, note="")
            self._progress.start()

    def advance(self, done: int, note: str = "") -> None:
        """Moves the bar."""
        if self._progress is not None and self._task is not None:
            with self._unless_gone():
                self._progress.update(self._task, completed=done, note=note)

    def epoch(self, entry: dict[str, Any]) -> None:
        """One line: what was learned, and how long it took so far."""
        self._remaining.epoch(entry)
        self.message(epoch_line(entry))


def epoch_line(entry: Mapping[str, Any]) -> str:
    """ "epoch 3: 91 % on held-out photos, loss 0.31; 2.5 min, 431 MB at most"."""
    epoch = finite(entry.get("epoch"))
    name = "the head alone" if epoch == 0 else f"epoch {epoch:g}" if epoch is not None else "epoch"
    parts = []
    if (accuracy := finite(entry.get("val_accuracy"))) is not None:
        parts.append(f"{percent(accuracy)} on held-out photos")
    if (loss := finite(entry.get("train_loss"))) is not None:
        parts.append(f"loss {loss:.3g}")
    cost = []
    if (seconds := finite(entry.get("seconds"))) is not None:
        cost.append(format_duration(seconds))
    if (peak := finite(entry.get("peak_rss_bytes"))) is not None:
        cost.append(f"{format_size(peak)} at most")
    line = "; ".join(part for part in (", ".join(parts), ", ".join(cost)) if part)
    return f"{name}: {line}" if line else name
