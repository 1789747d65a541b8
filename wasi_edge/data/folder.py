"""A folder of photos -> photos with labels, and a list of everything that was left out, with reasons.

Three layouts, recognised in this order:

    metadata   metadata.csv or .jsonl (Hugging Face) with `file_name` and `label`, also inside train/, val/
    split      {train,val|valid|validation|test}/<class>/**; test is validation only where there is no val
    classes    <class>/**

Every file ends up in `photos` or in `skipped` (a folder that is not entered is one entry). A photo is known
by its device and inode: links are followed, but nothing is counted twice and loops end; a file that can be
reached directly and through a link is taken directly. The order is that of the paths, whatever the disk says.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from wasi_edge.data.headers import DEFAULT_MIN_SIDE, Header, read_header
from wasi_edge.errors import NoUsableData, UnreadablePhoto
from wasi_edge.preprocess import MAX_PIXELS

PHOTO_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif",
     ".heic", ".heif", ".hif")
)  # fmt: skip
# Left behind by macOS, Windows, NAS boxes and photo managers; names starting with a dot are foreign as well.
FOREIGN_NAMES = frozenset(
    ("@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "#recycle", "$recycle.bin",
     "lost+found")
)  # fmt: skip
PART_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


@dataclass(frozen=True)
class Photo:
    """One usable photo; `part` is None where the layout leaves the split to us."""

    path: Path
    label: str
    part: str | None
    header: Header


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder left out: path relative to the root, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class PhotoFolder:
    """What `scan_folder` found; `layout` is "classes", "split" or "metadata"."""

    photos: tuple[Photo, ...]
    skipped: tuple[SkippedFile, ...]
    classes: tuple[str, ...]
    layout: str


@dataclass(frozen=True)
class _Found:
    path: Path
    label: str
    part: str | None
    linked: bool


def scan_folder(
    root: str | os.PathLike[str],
    min_classes: int = 2,
    min_photos_per_class: int = 2,
    min_side: int = DEFAULT_MIN_SIDE,
    max_pixels: int = MAX_PIXELS,
) -> PhotoFolder:
    """Find the photos below `root` and read their headers; nothing is decoded.

    `min_side` is the preprocessing's `resize_side`: the headers predict decoding memory for it.
    Raises `NoUsableData`: no such folder, no photos, fewer than `min_classes` classes, or a class with fewer
    than `min_photos_per_class` readable photos.
    """
    root = Path(os.path.abspath(root))
    if not root.exists():
        raise NoUsableData(f"{root}: no such folder")
    if not root.is_dir():
        raise NoUsableData(f"{root} is a file: expected a folder with one folder of photos per class")
    scan = _Scan(root)
    layout = scan.find()
    photos = []
    for found in scan.claimed():
        try:
            header = read_header(found.path, min_side, max_pixels)
        except UnreadablePhoto as error:
            scan.skip(found.path, str(error))
        else:
            photos.append(Photo(found.path, found.label, found.part, header))
    photos = scan.without_test_or_strangers(photos)
    _require_photos(root, scan, photos)
    readable = [photo.label for photo in photos]
    require_classes(scan.labels_tried, readable, min_classes, min_photos_per_class)
    skipped = sorted(scan.skipped, key=lambda entry: (entry.path, entry.reason))
    return PhotoFolder(tuple(photos), tuple(skipped), tuple(sorted(set(readable))), layout)


def require_classes(
    labels: Iterable[str], readable_labels: Iterable[str], min_classes: int, min_photos_per_class: int
) -> None:
    """Raise `NoUsableData` where readable photos are too few; `labels` may name classes with none left.

    Also for the time after decoding, when some photos of a class have turned out to be damaged.
    """
    counts = Counter(readable_labels)
    classes = sorted(set(labels))
    poor = [name for name in classes if counts[name] < min_photos_per_class]
    if poor:
        listed = ", ".join(f"'{name}' has {counts[name]}" for name in poor[:5]) + (" .." if poor[5:] else "")
        raise NoUsableData(
            f"every class needs at least {min_photos_per_class} readable photos, but {listed}: "
            "add photos or move that folder away"
        )
    if len(classes) < min_classes:
        found = f"only '{classes[0]}'" if len(classes) == 1 else f"{len(classes)}"
        raise NoUsableData(f"expected at least {min_classes} classes (one folder each), found {found}")


def _require_photos(root: Path, scan: _Scan, photos: list[Photo]) -> None:
    if photos:
        return
    if scan.loose:
        raise NoUsableData(
            f"{root} holds {scan.loose} photos but no class folders: sort them into one folder per class"
        )
    unreadable = f", and none of {len(scan.labels_tried)} files can be read" if scan.labels_tried else ""
    raise NoUsableData(f"{root}: no usable photos found{unreadable}: expected {root}/<class>/*.jpg")


class _Scan:
    """One walk over a folder: what was found, what was skipped, which folders were entered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.skipped: list[SkippedFile] = []
        self.loose = 0
        self.labels_tried: list[str] = []
        self._found: list[_Found] = []
        self._entered = {file_identity(root)}
        self._links: list[tuple[Path, str, str | None]] = []

    def skip(self, path: Path, reason: str) -> None:
        """List `path` with its reason."""
        relative = os.path.relpath(path, self.root)
        # A name that is no valid UTF-8 must not break the report that lists it.
        self.skipped.append(SkippedFile(os.fsencode(relative).decode("utf-8", "replace"), reason))

    # ------------------------------------------------------------------ layouts

    def find(self) -> str:
        """Walk the whole folder by its layout, whose name is returned."""
        if metadata := _metadata_file(self.root):
            self._read_metadata(metadata, None)
            return "metadata"
        folders, files = self._listing(self.root)
        names = [folder.name for folder in folders if folder.name.lower() in PART_OF_FOLDER]
        parts = {name: PART_OF_FOLDER[name.lower()] for name in names}
        if not self._is_split(folders, parts):
            self._classes(folders, files, None)
            self._follow_links()
            return "classes"
        uses_metadata = False
        for folder in folders:
            if folder.name not in parts:
                self.skip(folder, "lies beside train and val: only those are read")
                continue
            self._entered.add(file_identity(folder))
            if metadata := _metadata_file(folder):
                uses_metadata = True
                self._read_metadata(metadata, parts[folder.name])
            else:
                self._classes(*self._listing(folder), parts[folder.name])
        self._loose(files)
        self._follow_links()
        return "metadata" if uses_metadata else "split"

    def _is_split(self, folders: list[Path], parts: dict[str, str]) -> bool:
        """Whether train/ and val/ are parts, rather than class folders (of trains, say)."""
        train = [folder for folder in folders if parts.get(folder.name) == "train"]
        held_out = len(parts) > len(train)
        others = len(folders) > len(parts)
        if not train:
            return False
        if any(_metadata_file(folder) or _has_folders(folder) for folder in train):
            return held_out or not others
        if held_out and not others:
            raise NoUsableData(
                f"{self.root} has train and val folders without class folders in them: "
                "expected train/<class>/*.jpg and val/<class>/*.jpg"
            )
        return False

    def _classes(self, folders: list[Path], files: list[Path], part: str | None) -> None:
        for folder in folders:
            label = unicodedata.normalize("NFC", folder.name)
            before = len(self._found) + len(self._links)
            if folder.is_symlink():
                self._links.append((folder, label, part))  # until all real folders are known
            else:
                self._walk(folder, label, part, linked=False)
            if len(self._found) + len(self._links) == before:
                self.skip(folder, "a class folder without photos")
        self._loose(files)

    def _loose(self, files: list[Path]) -> None:
        for path in files:
            if self._is_photo_name(path):
                self.loose += 1
                self.skip(path, "lies beside the class folders: move it into one of them")

    # ------------------------------------------------------------------ walking

    def _listing(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """(folders, files) of `folder` in order, without foreign ones, which are listed."""
        folders, files = [], []
        try:
            children = folder_entries(folder)
        except OSError as error:
            self.skip(folder, f"the folder cannot be read ({error.strerror})")
            return [], []
        for child in children:
            if is_foreign(child):
                self.skip(child, "hidden or left by another program, not a photo")
            elif is_folder(child):
                folders.append(child)
            elif child.name not in METADATA_NAMES:
                files.append(child)
        return folders, files

    def _is_photo_name(self, path: Path) -> bool:
        if path.suffix.lower() in PHOTO_SUFFIXES:
            return True
        self.skip(path, f"not a supported photo format ({path.suffix or 'no suffix'})")
        return False

    def _walk(self, folder: Path, label: str, part: str | None, linked: bool) -> None:
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            identity = file_identity(current)
            if identity in self._entered or (linked and _holds(current, self.root)):
                self.skip(current, "a link to a folder that is read already, or that holds them all")
                continue
            self._entered.add(identity)
            folders, files = self._listing(current)
            for path in files:
                if self._is_photo_name(path):
                    self._found.append(_Found(path, label, part, linked or path.is_symlink()))
            for child in folders:
                if child.is_symlink():
                    self._links.append((child, label, part))
                else:
                    waiting.append(child)

    def _follow_links(self) -> None:
        while self._links:
            folder, label, part = self._links.pop(0)
            self._walk(folder, label, part, linked=True)

    def _read_metadata(self, metadata: Path, part: str | None) -> None:
        """Take the photos that a metadata file names, and list those that it does not."""
        base = metadata.parent
        named: dict[Path, str] = {}
        for file_name, label in _metadata_rows(metadata):
            path = Path(os.path.normpath(base / file_name))
            if not path.is_relative_to(os.path.normpath(self.root)):
                self.skip(path, f"named in {metadata.name}, but lies outside the folder")
            elif not os.path.isfile(path):
                self.skip(path, f"named in {metadata.name}, but not there")
            elif named.setdefault(path, label) != label:
                self.skip(path, f"{metadata.name} gives it two labels: '{named[path]}', used, and '{label}'")
        for path, label in named.items():
            inner = part or PART_OF_FOLDER.get(os.path.relpath(path, base).split(os.sep)[0].lower())
            self._found.append(_Found(path, label, inner, path.is_symlink()))
        waiting = [base]
        while waiting:
            folders, files = self._listing(waiting.pop())
            # A link could lead anywhere: photos behind it are used if named, and not listed if not.
            waiting += [folder for folder in folders if not folder.is_symlink()]
            for path in files:
                if path not in named and self._is_photo_name(path):
                    self.skip(path, f"not named in {metadata.name}")

    # ------------------------------------------------------------------ results

    def claimed(self) -> list[_Found]:
        """The photos in order of path, each file once."""
        owner: dict[tuple[int, int], Path] = {}
        kept = []
        for found in sorted(self._found, key=lambda f: (f.linked, f.path.as_posix())):
            try:
                identity = file_identity(found.path)
            except OSError:
                self.skip(found.path, "a link that leads nowhere")
                continue
            first = owner.setdefault(identity, found.path)
            if first is found.path:
                kept.append(found)
            else:
                self.skip(found.path, f"the same file as {os.path.relpath(first, self.root)}")
        kept.sort(key=lambda f: f.path.as_posix())
        self.labels_tried = [found.label for found in kept]
        return kept

    def without_test_or_strangers(self, photos: list[Photo]) -> list[Photo]:
        """Settle the parts: test becomes val where there is none; classes that are never trained on go."""
        has_val = any(photo.part == "val" for photo in photos)
        if has_val:
            tests = sum(photo.part == "test" for photo in photos)
            if tests:
                self.skip(self.root / "test", f"{tests} photos kept out: validation uses the val folder")
            photos = [photo for photo in photos if photo.part != "test"]
        else:
            photos = [replace(photo, part="val") if photo.part == "test" else photo for photo in photos]
        if not any(photo.part == "val" for photo in photos):
            return photos
        trained = {photo.label for photo in photos if photo.part != "val"}
        for photo in photos:
            if photo.label not in trained:
                self.skip(photo.path, f"class '{photo.label}' has no training photos")
        self.labels_tried = [label for label in self.labels_tried if label in trained]
        return [photo for photo in photos if photo.label in trained]


def folder_entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name. Raises OSError where it cannot be listed."""
    return sorted(folder.iterdir(), key=lambda child: child.name)


def is_foreign(path: Path) -> bool:
    """Whether another program left this beside the photos (`._*`, `@eaDir`, `Thumbs.db`, hidden files)."""
    return path.name.startswith(".") or path.name.lower() in FOREIGN_NAMES


def _has_folders(folder: Path) -> bool:
    return any(is_folder(child) and not is_foreign(child) for child in folder_entries(folder))


def is_folder(path: Path) -> bool:
    """Whether this is a folder or leads to one."""
    try:
        return path.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _holds(folder: Path, inner: Path) -> bool:
    return inner.resolve().is_relative_to(folder.resolve())


def file_identity(path: Path) -> tuple[int, int]:
    """What stays the same whichever way a file or folder is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _metadata_file(folder: Path) -> Path | None:
    return next((folder / name for name in METADATA_NAMES if (folder / name).is_file()), None)


def _metadata_rows(metadata: Path) -> list[tuple[str, str]]:
    """(file_name, label) of every row. Raises `NoUsableData`, naming the line."""
    rows: list[tuple[str, str]] = []
    try:
        with metadata.open(encoding="utf-8-sig", newline="") as file:
            is_csv = metadata.suffix == ".csv"
            records = csv.DictReader(file) if is_csv else map(json.loads, filter(str.strip, file))
            for number, record in enumerate(records, start=1):
                fields = record if isinstance(record, dict) else {}
                values = (fields.get(key) for key in ("file_name", "label"))
                name, label = ("" if value is None else str(value).strip() for value in values)
                if not name or not label or "\0" in name:
                    raise NoUsableData(
                        f"{metadata}: expected `file_name` and `label` in every row, row {number} has not"
                    )
                rows.append((name, unicodedata.normalize("NFC", label)))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise NoUsableData(f"{metadata}: row {len(rows) + 1} cannot be read ({error}): save it as UTF-8") from error
    return rows
