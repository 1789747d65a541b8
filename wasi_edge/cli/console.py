"""Streams of the command line: results and JSON on stdout, all else on stderr. Rich is imported late.

A stream that is no terminal gets neither colour nor moving bars, whatever FORCE_COLOR says; NO_COLOR takes
the colour from a terminal, too (Rich reads it). Names of photos come from strangers' disks: what they hold of
control characters is replaced before it reaches a terminal.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console


def settle_streams() -> None:
    """From here on a character that a stream cannot encode is replaced, instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


def prepare_torch(threads: int | None = None) -> None:
    """The settings of memory and threads that must come before torch. Does nothing once torch is imported."""
    if "torch" not in sys.modules:
        from wasi_edge.memory.malloc import settle_threads, tune_malloc

        tune_malloc()
        settle_threads(threads)


def stdout_console() -> Console:
    """For results that a person reads."""
    return _console(sys.stdout)


def stderr_console() -> Console:
    """For progress and messages."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    return Console(file=stream, force_terminal=stream.isatty(), highlight=False, soft_wrap=False)


def is_lively(console: Console) -> bool:
    """Whether bars may move on it."""
    return console.is_terminal and not console.is_dumb_terminal


def print_json(value: Any) -> None:
    """The command's one JSON value, on stdout."""
    sys.stdout.write(json_text(value) + "\n")


def print_json_list(texts: Sequence[str]) -> None:
    """The same, a list of what `json_text` gave: long lists take a tenth of the memory as text."""
    sys.stdout.write("[")
    for number, text in enumerate(texts):
        sys.stdout.write(("," if number else "") + "\n" + text)
    sys.stdout.write("\n]\n")


def json_text(value: Any) -> str:
    """`value` as JSON that stdout can carry."""
    encoding = (getattr(sys.stdout, "encoding", None) or "ascii").lower().replace("-", "")
    # Anything but UTF-8 could not carry every name; a lone surrogate is no JSON text in either.
    text = json.dumps(value, ensure_ascii=encoding != "utf8", indent=1, allow_nan=False)
    return text.encode("utf-8", "replace").decode()


def say(text: str) -> None:
    """One line on stderr, or several."""
    from wasi_edge.report.svg import printable

    with contextlib.suppress(OSError):  # of a terminal that has gone
        sys.stderr.write("\n".join(map(printable, text.split("\n"))) + "\n")


@contextlib.contextmanager
def progress_bar(description: str, shown: bool = True) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr while the block runs; calls of what it gives, (done, all or None), move it.

    There is none unless it is `shown` and stderr is a terminal.
    """
    console = stderr_console()
    if not (shown and is_lively(console)):
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
