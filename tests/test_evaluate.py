"""Scores on folders whose right answers are known."""

from __future__ import annotations

import pytest
from photos import save_jpeg, scene, truncated_jpeg
from test_predict import Brightness

from wasi_edge.errors import NoUsableData
from wasi_edge.inference.evaluate import evaluate_folder

LEVELS = {"dark": 20, "middle": 128, "bright": 240}


def photo(path, looks):
    return save_jpeg(path, scene(0, 64, 48).point(lambda _: LEVELS[looks]))


@pytest.fixture
def folder(tmp_path):
    """Dark: 2 right, 1 taken for bright. Middle: 1 right. No bright ones."""
    root = tmp_path / "photos"
    for index, looks in enumerate(["dark", "dark", "bright"]):
        photo(root / "dark" / f"{index}.jpg", looks)
    photo(root / "middle" / "0.jpg", "middle")
    return root


def test_the_contracts_keys(folder):
    seen = []
    result = evaluate_folder(Brightness(), folder, on_progress=lambda done, total: seen.append((done, total)))
    assert result["labels"] == ["dark", "middle", "bright"]
    assert result["confusion"] == [[2, 0, 1], [0, 1, 0], [0, 0, 0]]
    assert result["accuracy"] == 3 / 4 and result["num_images"] == 4
    assert result["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert result["per_class"]["dark"] == {"precision": 1.0, "recall": 2 / 3, "support": 3}
    assert result["per_class"]["bright"] == {"precision": 0.0, "recall": None, "support": 0}
    assert result["skipped_files"] == []
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_unknown_classes_and_unreadable_photos_are_listed_not_counted(folder):
    photo(folder / "weird" / "0.jpg", "dark")
    truncated_jpeg(folder / "dark" / "cut.jpg")
    (folder / "dark" / "empty.jpg").write_bytes(b"")
    messages = []
    result = evaluate_folder(Brightness(), folder, on_message=messages.append)
    reasons = {entry["path"]: entry["reason"] for entry in result["skipped_files"]}
    assert result["num_images"] == 4
    assert reasons["weird/0.jpg"] == "the model does not know the class 'weird'"
    assert reasons["dark/cut.jpg"].startswith("truncated")
    assert reasons["dark/empty.jpg"] == "empty file (0 bytes)"
    assert any("1 photos are left out" in text for text in messages)


def test_of_a_split_folder_the_validation_part_counts(tmp_path):
    root = tmp_path / "photos"
    for looks in ("dark", "middle"):
        for index in range(3):
            photo(root / "train" / looks / f"{index}.jpg", "bright")
        photo(root / "val" / looks / "0.jpg", looks)
    messages = []
    result = evaluate_folder(Brightness(), root, on_message=messages.append)
    assert result["accuracy"] == 1.0 and result["num_images"] == 2
    assert "2 validation photos" in messages[0] and "6" in messages[0]


def test_one_class_is_enough_to_evaluate(tmp_path):
    photo(tmp_path / "photos" / "dark" / "0.jpg", "dark")
    assert evaluate_folder(Brightness(), tmp_path / "photos")["accuracy"] == 1.0


def test_a_folder_without_one_known_class_is_refused(tmp_path):
    photo(tmp_path / "photos" / "tulip" / "0.jpg", "dark")
    photo(tmp_path / "photos" / "rose" / "0.jpg", "dark")
    with pytest.raises(NoUsableData, match=r"'dark', 'middle', 'bright'.*'rose', 'tulip'"):
        evaluate_folder(Brightness(), tmp_path / "photos")


def test_a_folder_of_photos_that_all_break_in_decoding_is_refused(tmp_path):
    truncated_jpeg(save_jpeg(tmp_path / "photos" / "dark" / "0.jpg", scene(1)))
    with pytest.raises(NoUsableData, match="none of its 1 photos"):
        evaluate_folder(Brightness(), tmp_path / "photos")
