"""Every error a user can meet, each with the exit code of the CLI contract.

A message says what was expected, what was found and what to do. Anything that is
not a `WasiEdgeError` is a bug and is shown as one.
"""

from __future__ import annotations

import signal


class WasiEdgeError(Exception):
    """Base class. `exit_code` is what the process returns."""

    exit_code = 1


class UsageError(WasiEdgeError):
    """The command's words contradict each other or the files on disk."""

    exit_code = 2


class BudgetInfeasible(WasiEdgeError):
    """No plan fits the budget; nothing was started or written."""

    exit_code = 3

    def __init__(self, message: str, smallest_feasible_budget_bytes: int | None = None) -> None:
        super().__init__(message)
        self.smallest_feasible_budget_bytes = smallest_feasible_budget_bytes


class NoUsableData(WasiEdgeError):
    """The photos cannot be trained on or classified: none, one class, too few, all unreadable."""

    exit_code = 4


class Interrupted(WasiEdgeError):
    """Stopped by a signal after saving."""

    exit_code = 130


class ArtefactError(WasiEdgeError):
    """A model file or folder is missing, damaged or of an unknown schema."""


class ConversionError(WasiEdgeError):
    """A checkpoint cannot be converted: unknown keys, wrong shapes, unsupported architecture."""


class UnreadablePhoto(WasiEdgeError):
    """One photo cannot be used; the message is the reason listed in the report."""


def reason_of_end(status: int) -> str:
    """Why a child process ended that a signal ended; `status` is its negative return code."""
    name = signal.Signals(-status).name
    if name == "SIGILL":
        return "this torch needs a newer processor (2.10.0 does on a Pi 4: take torch 2.9.1, or 2.11 and newer)"
    if name == "SIGKILL":
        return "it was killed, probably because memory ran out"
    return f"it crashed ({name})"
