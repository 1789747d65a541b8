"""What several commands ask of their options."""

from __future__ import annotations

from pathlib import Path

from wasi_edge.errors import UsageError
from wasi_edge.units import parse_size


def budget_from(text: str | None) -> int:
    """Bytes of `--budget`; without one the smaller of 512 MB and half of what is free. Raises UsageError."""
    if text is not None:
        return parse_size(text)
    from wasi_edge.memory.process import default_budget_bytes

    return default_budget_bytes()


def require(option: str, value: float | None, holds: bool, expected: str) -> None:
    """Raises UsageError naming the option, what it must be and what was found."""
    if not holds:
        raise UsageError(f"{option} must be {expected}, found {value:g}")


def require_empty(out: Path, otherwise: str, allowed: bool = False) -> None:
    """Raises UsageError if the folder `out` is a file, or holds something and that is not `allowed`."""
    try:
        if any(out.iterdir()) and not allowed:
            raise UsageError(f"{out} is not empty: choose another folder, or {otherwise}")
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise UsageError(f"{out} is a file; expected a new or an empty folder") from None
