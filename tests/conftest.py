"""What every test starts from: a home of its own, two threads, no network, data only where it exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Before any test module imports torch, and inherited by the processes that tests start.
for _variable, _value in {
    "OMP_NUM_THREADS": "2",
    "OPENBLAS_NUM_THREADS": "2",
    "MKL_NUM_THREADS": "2",
    "HF_HUB_OFFLINE": "1",
    "NO_COLOR": "1",
}.items():
    os.environ.setdefault(_variable, _value)


@pytest.fixture(autouse=True)
def user_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Moves the user's home, caches and settings to a temporary folder; returns that home."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name, folder in {
        "XDG_CACHE_HOME": ".cache",
        "XDG_CONFIG_HOME": ".config",
        "XDG_DATA_HOME": ".local/share",
    }.items():
        monkeypatch.setenv(name, str(home / folder))
    monkeypatch.delenv("HF_HOME", raising=False)
    return home


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real photos beside the repository; the test is skipped where there is none."""
    return _beside_repository("data", "real photos")


@pytest.fixture(scope="session")
def shared_model() -> Path:
    """The Hugging Face folder of ViT-S/14 beside the repository; skipped where there is none."""
    return _beside_repository("models/vit-s14", "the pretrained ViT-S/14")


def _beside_repository(name: str, content: str) -> Path:
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs {content} in ../shared/{name}, which is not part of the project")
    return folder
