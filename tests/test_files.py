"""Files stay short enough to be read in one go."""

from __future__ import annotations

from pathlib import Path

MOST_LINES = 400


def test_no_package_file_reaches_400_lines(root: Path) -> None:
    lengths = {
        str(path.relative_to(root)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (root / "wasi_edge").rglob("*.py")
    }
    assert lengths
    assert {name: lines for name, lines in lengths.items() if lines >= MOST_LINES} == {}


def test_every_package_module_says_what_it_is(root: Path) -> None:
    silent = [
        str(path.relative_to(root))
        for path in (root / "wasi_edge").rglob("*.py")
        if path.read_text(encoding="utf-8").strip() and not path.read_text(encoding="utf-8").startswith('"""')
    ]
    assert silent == []
