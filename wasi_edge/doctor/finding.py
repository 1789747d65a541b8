"""What an examination finds: one line of `wasi-edge doctor`."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple


class Status(enum.StrEnum):
    """How bad it is."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


class Finding(NamedTuple):
    """`check`: what was looked at; `found`: in words; `remedy`: what to do, None where nothing is to be done."""

    check: str
    status: Status
    found: str
    remedy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As `doctor --json` prints it."""
        return {**self._asdict(), "status": str(self.status)}


def good(check: str, found: str) -> Finding:
    """Nothing is to be done."""
    return Finding(check, Status.GOOD, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """It works, but not as well as it could."""
    return Finding(check, Status.WARNING, found, remedy)


def bad(check: str, found: str, remedy: str) -> Finding:
    """It does not work, or will stop."""
    return Finding(check, Status.BAD, found, remedy)
