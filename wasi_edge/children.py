"""Python processes that a command starts beside itself."""

from __future__ import annotations

import sys


def python_command(*words: str) -> list[str]:
    """The command line of a child by the same Python: `-m` and a module, or `-c` and code.

    Its imports are looked for where ours are and not in the current folder first (`-P`): that holds the owner's files,
    or files from elsewhere, and what is called `random.py` there is not to be run.
    """
    return [sys.executable, "-P", *words]
