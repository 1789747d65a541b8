"""Folders as owners have them: three layouts, foreign files, links, and errors that say what to do."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import photos
import pytest

from wasi_edge.data.folder import PhotoFolder, scan_folder
from wasi_edge.errors import NoUsableData


def names(found: PhotoFolder, root: Path) -> list[str]:
    return [photo.path.relative_to(root).as_posix() for photo in found.photos]


def reasons(found: PhotoFolder) -> dict[str, str]:
    return {entry.path: entry.reason for entry in found.skipped}


def test_class_folders_with_subfolders(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"cat": 2, "dog/2023/may": 2, "dog": 1})
    found = scan_folder(tmp_path)
    assert (found.classes, found.layout, found.skipped) == (("cat", "dog"), "classes", ())
    assert [(photo.label, photo.part) for photo in found.photos] == [("cat", None)] * 2 + [("dog", None)] * 3
    assert found.photos[0].header.width == 160


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val", "test"])
def test_split_folders(val: str, tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train/a": 2, "train/b": 2, f"{val}/a": 1, f"{val}/b": 1})
    found = scan_folder(tmp_path)
    assert found.layout == "split" and found.classes == ("a", "b")
    assert sorted(photo.part or "" for photo in found.photos) == ["train"] * 4 + ["val"] * 2


def test_test_photos_stay_out_where_there_is_val(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 3, "test/c": 3})
    found = scan_folder(tmp_path)
    assert found.classes == ("a", "b") and not any("test" in name for name in names(found, tmp_path))
    assert "6 photos" in reasons(found)["test"]


def test_a_class_only_in_val_is_listed_and_no_class(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/zebra": 1})
    found = scan_folder(tmp_path)
    assert found.classes == ("a", "b")
    assert "no training photos" in reasons(found)["val/zebra/000.jpg"]


def test_photos_of_trains_are_a_class(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train": 2, "train/steam": 1, "bus": 2})
    found = scan_folder(tmp_path)
    assert found.layout == "classes" and found.classes == ("bus", "train")


def test_train_and_val_without_class_folders_say_so(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train": 2, "val": 2})
    (tmp_path / "train" / "@eaDir").mkdir()
    with pytest.raises(NoUsableData, match="train/<class>"):
        scan_folder(tmp_path)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("inside", ["", "train/"])
def test_hugging_face_metadata(kind: str, inside: str, tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"train": 4, "val": 2})
    for part, count in [("train", 4), ("val", 2)]:
        rows = [(f"{index:03d}.jpg", "ab"[index % 2]) for index in range(count)]
        folder = tmp_path / part if inside else tmp_path
        prefix = "" if inside else f"{part}/"
        with open(folder / f"metadata.{kind}", "a", encoding="utf-8") as file:
            if kind == "csv" and file.tell() == 0:
                file.write("\ufefffile_name,label\n")
            for name, label in rows:
                record = {"file_name": prefix + name, "label": label}
                file.write(f"{prefix}{name},{label}\n" if kind == "csv" else json.dumps(record) + "\n")
    found = scan_folder(tmp_path)
    assert found.layout == "metadata" and found.classes == ("a", "b") and found.skipped == ()
    assert [photo.part for photo in found.photos] == ["train"] * 4 + ["val"] * 2


def test_metadata_cannot_reach_outside_and_lists_what_it_does_not_name(tmp_path: Path) -> None:
    root = photos.class_folders(tmp_path / "root", {"x": 5})
    photos.save_jpeg(tmp_path / "outside.jpg", photos.scene(99))
    rows = [
        "x/000.jpg,a",
        "./x/001.jpg,a",
        "x/002.jpg,b",
        "x/003.jpg,b",
        "../outside.jpg,b",
        "x/gone.jpg,b",
        "x/000.jpg,b",
    ]
    (root / "metadata.csv").write_text("file_name,label\n" + "\n".join(rows))
    # A root that is not in its simplest form must not confuse names with paths.
    found = scan_folder(root / ".." / "root")
    assert len(found.photos) == 4
    listed = reasons(found)
    assert "outside" in listed["../outside.jpg"] and "not there" in listed["x/gone.jpg"]
    assert "not named" in listed["x/004.jpg"] and "two labels" in listed["x/000.jpg"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b"file,class\na.jpg,x\n"),
        ("metadata.csv", b"file_name,label\na.jpg,\xff\xfe\n"),
        ("metadata.jsonl", b'{"file_name": "a.jpg"}\n'),
        ("metadata.jsonl", b"[1, 2]\n"),
        ("metadata.jsonl", b"{broken\n"),
    ],
)
def test_unusable_metadata_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NoUsableData, match=name):
        scan_folder(tmp_path)


def test_foreign_files_are_listed_and_not_photos(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"a": 2, "b": 2, "@eaDir": 2, "__MACOSX/a": 1, ".trash": 1, "a/.hidden": 1})
    for name in (
        "a/._000.jpg",
        "a/.DS_Store",
        "b/Thumbs.db",
        "desktop.ini",
        "a/notes.txt",
        "a/raw.CR2",
        "loose.jpg",
    ):
        (tmp_path / name).write_bytes(b"x")
    found = scan_folder(tmp_path)
    assert len(found.photos) == 4
    listed = reasons(found)
    foreign = {
        "@eaDir",
        "__MACOSX",
        ".trash",
        "a/.hidden",
        "a/._000.jpg",
        "a/.DS_Store",
        "b/Thumbs.db",
        "desktop.ini",
    }
    assert set(listed) == foreign | {"a/notes.txt", "a/raw.CR2", "loose.jpg"}
    assert ".CR2" in listed["a/raw.CR2"] and "class folders" in listed["loose.jpg"]


def test_unreadable_photos_are_listed_and_the_rest_is_used(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"a": 2, "b": 2})
    for name, make in photos.UNREADABLE.items():
        make(tmp_path / "a" / name)
    found = scan_folder(tmp_path)
    # A truncated photo has a sound header: only decoding finds it.
    assert set(reasons(found)) == {f"a/{name}" for name in photos.UNREADABLE if name != "truncated.jpg"}


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    root = photos.class_folders(tmp_path / "root", {"b": 2})
    photos.class_folders(tmp_path / "elsewhere", {"cats": 3})
    (root / "a-cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "b" / "loop").symlink_to(root)
    (root / "b" / "again").symlink_to(root / "b")
    (root / "b" / "above").symlink_to(tmp_path)
    (root / "b" / "cats").symlink_to(tmp_path / "elsewhere" / "cats")
    (root / "a-copy.d").mkdir()
    (root / "a-copy.d" / "linked.jpg").symlink_to(root / "b" / "000.jpg")
    (root / "b" / "nowhere.jpg").symlink_to(root / "gone.jpg")
    (root / "b" / "itself.jpg").symlink_to(root / "b" / "itself.jpg")
    found = scan_folder(root)
    # What is reached only through links to photos of another class is no class.
    assert found.classes == ("a-cats", "b")
    assert names(found, root) == [
        "a-cats/000.jpg",
        "a-cats/001.jpg",
        "a-cats/002.jpg",
        "b/000.jpg",
        "b/001.jpg",
    ]
    listed = reasons(found)
    assert listed["a-copy.d/linked.jpg"] == "the same file as b/000.jpg"
    assert {"b/loop", "b/again", "b/above", "b/cats", "b/nowhere.jpg", "b/itself.jpg"} <= set(listed)


def test_class_names_are_nfc_and_two_spellings_are_one_class(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"Käfer": 1, unicodedata.normalize("NFD", "Käfer"): 1, "сад": 2})
    found = scan_folder(tmp_path)
    assert found.classes == ("Käfer", "сад") and len(found.photos) == 4


def test_a_name_that_is_no_utf8_can_still_be_reported(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"a": 2, "b": 2})
    with open(os.path.join(os.fsencode(tmp_path), b"a", b"\xff.txt"), "wb"):
        pass
    (entry,) = scan_folder(tmp_path).skipped
    entry.path.encode("utf-8")


def test_a_pipe_among_the_photos_does_not_block(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"a": 2, "b": 2})
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    assert "regular" in reasons(scan_folder(tmp_path))["a/pipe.jpg"]


def test_the_order_is_that_of_names(tmp_path: Path) -> None:
    for index in (3, 1, 2, 0):
        photos.save_jpeg(tmp_path / "ba"[index % 2] / f"{index}.jpg", photos.scene(index))
    found = scan_folder(tmp_path)
    assert names(found, tmp_path) == ["a/1.jpg", "a/3.jpg", "b/0.jpg", "b/2.jpg"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "no usable photos"),
        ({".": 3}, "no class folders"),
        ({"only": 3}, "at least 2 classes"),
        ({"a": 3, "poor": 1}, "'poor' has 1"),
    ],
)
def test_too_little_says_what_is_missing(counts: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(NoUsableData, match=message):
        scan_folder(photos.class_folders(tmp_path, counts))


def test_a_class_with_nothing_readable_is_an_error_and_an_empty_folder_is_not(tmp_path: Path) -> None:
    photos.class_folders(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "empty").mkdir()
    assert "without photos" in reasons(scan_folder(tmp_path))["empty"]
    (tmp_path / "empty" / "a.jpg").write_bytes(b"")
    with pytest.raises(NoUsableData, match="'empty' has 0"):
        scan_folder(tmp_path)


def test_no_folder_and_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoUsableData, match="no such folder"):
        scan_folder(tmp_path / "gone")
    with pytest.raises(NoUsableData, match="is a file"):
        scan_folder(tmp_path / "file")


def test_real_folders(shared_data: Path) -> None:
    clothing = scan_folder(shared_data / "clothing")
    assert len(clothing.photos) == 650 and clothing.layout == "classes" and clothing.skipped == ()
    hymenoptera = scan_folder(shared_data / "hymenoptera")
    assert [sum(p.part == part for p in hymenoptera.photos) for part in ("train", "val")] == [60, 30]
