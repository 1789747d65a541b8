"""Is the container's command at work? Exits 0 where it is, 1 with a reason where it stands still.

A run that trains uses the processor or the disk all the time, unless it waits for a child or for the machine to cool
down; then it sleeps and wakes. So the command is at work where its main thread, or that of a process it started, has
run at all since the last check. One that hangs in a dead file system or a lock has not; threads that merely watch it
go on, and do not count.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def switches(proc: Path) -> int:
    """How often the main threads of all processes but this one have been put on a processor."""
    count = 0
    for process in proc.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        status = process / "task" / process.name / "status"
        try:
            text = status.read_text()
        except OSError:  # ended meanwhile
            continue
        fields = (line.split() for line in text.splitlines() if "ctxt_switches" in line)
        count += sum(int(words[1]) for words in fields)
    return count


def main(proc: Path = Path("/proc"), note: Path = Path("/tmp/wasi-edge-health")) -> int:
    """Compare with what the last check wrote down."""
    now = switches(proc)
    try:
        before = int(note.read_text())
    except (OSError, ValueError):
        before = -1
    try:
        note.write_text(str(now))
    except OSError as error:  # a read-only container without a tmpfs: there is nothing to compare with
        print(f"not checked: {error}", file=sys.stderr)
        return 0
    if now == before:
        print("no main thread has run since the last check", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
