"""Run a command under a real memory limit of the kernel, swap off: does it live, and what did it use?

    sudo python benchmarks/limited_run.py 512MB wasi-edge finetune ./photos --budget 512MB

The command runs in a control group of its own: version 2 where the memory controller is there (`memory.max`,
`memory.swap.max` = 0), else version 1 (`memory.limit_in_bytes`, `memory.memsw.limit_in_bytes`). Everything of its
processes counts, the page cache of the files they read and write too; the kernel takes back what it can and kills when
that does not do. The last line, on stderr, is JSON: the exit code, the highest usage, how often the limit was met and
how many processes were killed. Exit code: the command's; 1 where no limit can be set, with the reason.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from wasi_edge.units import parse_size

ROOT = Path("/sys/fs/cgroup")
NAME = f"wasi-edge-{os.getpid()}"


def main() -> int:
    """Limit, run, report."""
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    limit = parse_size(sys.argv[1])
    try:
        group = make_group(limit)
    except OSError as error:
        print(f"no memory limit can be set here: {error}", file=sys.stderr)
        return 1
    try:
        done = subprocess.run(sys.argv[2:], check=False, preexec_fn=lambda: enter(group))
        found = {"exit_code": done.returncode, "limit_bytes": limit, **usage(group)}
    finally:
        group.rmdir()
    print(json.dumps(found), file=sys.stderr)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode


def make_group(limit: int) -> Path:
    """A new control group with the limit. Raises OSError where the system does not allow it."""
    unified = ROOT if (ROOT / "cgroup.controllers").exists() else None
    if unified is not None and "memory" in (unified / "cgroup.subtree_control").read_text().split():
        group = unified / NAME
        group.mkdir()
        settings = {"memory.max": limit, "memory.swap.max": 0}
    else:
        group = ROOT / "memory" / NAME
        group.mkdir()
        # the second bounds memory and swap together, and must not be the smaller one
        settings = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
    try:
        for name, value in settings.items():
            if (group / name).exists():  # without swap there is none to turn off
                (group / name).write_text(str(value))
    except OSError:
        group.rmdir()
        raise
    return group


def enter(group: Path) -> None:
    """Move this process into the group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def usage(group: Path) -> dict[str, int | None]:
    """Highest usage in bytes, times the limit was met, processes killed."""
    if (group / "memory.max").exists():
        events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
        peak = group / "memory.peak"
        highest = int(peak.read_text()) if peak.exists() else None
        return {"highest_bytes": highest, "limit_met": int(events["max"]), "killed": int(events["oom_kill"])}
    control = dict(line.split() for line in (group / "memory.oom_control").read_text().splitlines())
    return {
        "highest_bytes": int((group / "memory.max_usage_in_bytes").read_text()),
        "limit_met": int((group / "memory.failcnt").read_text()),
        "killed": int(control["oom_kill"]) if "oom_kill" in control else None,
    }


if __name__ == "__main__":
    sys.exit(main())
