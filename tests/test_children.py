"""Python processes beside a command: whose modules they run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import wasi_edge
from wasi_edge.children import python_command

PACKAGE = Path(wasi_edge.__file__).parent


def test_a_module_of_the_current_folder_is_not_run(tmp_path: Path) -> None:
    for name in ("json", "wasi_edge"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the file of the current folder')\n")

    for words in (("-m", "json.tool", "--help"), ("-m", "wasi_edge", "--version"), ("-c", "import json; print(json)")):
        done = subprocess.run(python_command(*words), cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout


def test_no_child_is_started_in_another_way() -> None:
    starters = [path for path in PACKAGE.rglob("*.py") if "sys.executable" in path.read_text()]

    assert starters == [PACKAGE / "children.py"]
