"""Which photos train and which validate, without letting a burst stand on both sides.

Ten near-identical shots of one thing, split by chance, make validation measure memory. So photos are grouped
by a 64-bit difference hash (is each of 8 x 8 places brighter than its right neighbour?); groups move as one.

The split of a class depends on the seed, its own name and its own photos in their order, on nothing else:
another class beside it changes nothing, nor does Python's hash seed.

How near is near: among 650 different photos of clothes (5 classes, short side 192) a distance of up to 6 bits
groups 39 of them, in groups of at most 7; 7 bits group 65, 8 bits 101 in chains of up to 35. A second shot of
one thing, 1 % shifted and scaled, turned by half a degree, 5 % brighter and saved anew, lies within 6 bits in
94 of 100 cases (median 3). So 6: joining two different photos costs little, a long chain would not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from wasi_edge.errors import UsageError

MAX_DISTANCE = 6
_BLOCK_ROWS = 256
_BITS_OF_16 = np.array([bin(value).count("1") for value in range(2**16)], dtype=np.uint8)


def difference_hash(shrunk: np.ndarray) -> int:
    """64 bits of a photo's coarse layout: bit (row, column) says whether brightness falls to the right.

    `shrunk` is uint8 (h, w, 3). Unchanged by scale, contrast and small shifts; flipped by mirroring.
    """
    tiny = Image.fromarray(shrunk).convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    grey = np.asarray(tiny)
    falls = grey[:, :-1] > grey[:, 1:]
    return int.from_bytes(np.packbits(falls).tobytes(), "big")


def near_duplicate_groups(
    hashes: Sequence[int], labels: Sequence[str] | None = None, max_distance: int = MAX_DISTANCE
) -> list[int]:
    """A group number for each photo; photos of one class whose hashes differ in few bits share it.

    Groups are joined through chains (a-b and b-c join a and c), as a burst drifts. Numbers count up in order
    of first appearance. Without `labels` all photos count as one class.
    """
    names = [""] * len(hashes) if labels is None else list(labels)
    parent = list(range(len(hashes)))

    def find(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    members: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        members.setdefault(name, []).append(index)
    for indices in members.values():
        words = np.array([hashes[i] for i in indices], dtype=np.uint64).view(np.uint16).reshape(-1, 4)
        for first, second in _near_pairs(words, max_distance):
            a, b = sorted((find(indices[first]), find(indices[second])))
            parent[b] = a  # the smaller index leads, so the result does not depend on the order of pairs
    numbers: dict[int, int] = {}
    return [numbers.setdefault(find(index), len(numbers)) for index in range(len(parent))]


def _near_pairs(words: np.ndarray, max_distance: int) -> list[tuple[int, int]]:
    """Index pairs (i < j) of hashes at most `max_distance` bits apart; `words` is uint16 (n, 4)."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(words), _BLOCK_ROWS):
        block = words[start : start + _BLOCK_ROWS]
        distance = np.zeros((len(block), len(words) - start), dtype=np.uint8)
        for word in range(4):
            distance += _BITS_OF_16[block[:, word, None] ^ words[None, start:, word]]
        rows, columns = np.nonzero(distance <= max_distance)
        ahead = columns > rows
        pairs += zip((rows[ahead] + start).tolist(), (columns[ahead] + start).tolist(), strict=True)
    return pairs


def split(
    labels: Sequence[str],
    groups: Sequence[int],
    parts: Sequence[str | None],
    val_fraction: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(train indices, val indices), both ascending int64.

    Where any of `parts` is "val" the parts are kept as they are. Otherwise each class is split by whole
    groups: about `val_fraction` of its photos validate, at least one group where the class has two, and at
    least one group trains. 0 validates on nothing. Raises `UsageError` for a fraction outside [0, 1).
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"--val-split must be at least 0 and below 1, found {val_fraction}")
    validates = np.zeros(len(labels), dtype=bool)
    if "val" in parts:
        validates[:] = [part == "val" for part in parts]
    elif val_fraction > 0:
        members: dict[str, list[int]] = {}
        for index, label in enumerate(labels):
            members.setdefault(label, []).append(index)
        for label, indices in members.items():
            validates[_held_out(label, indices, groups, val_fraction, seed)] = True
    return np.flatnonzero(~validates), np.flatnonzero(validates)


def _held_out(label: str, indices: list[int], groups: Sequence[int], val_fraction: float, seed: int) -> list[int]:
    """The photos of one class that validate."""
    by_group: dict[int, list[int]] = {}
    for index in indices:
        by_group.setdefault(groups[index], []).append(index)
    if len(by_group) < 2:
        return []
    # The class name's bytes are part of the key: other classes cannot shift this one's draws.
    rng = np.random.Generator(np.random.PCG64([seed, *label.encode()]))
    shuffled = [list(by_group.values())[i] for i in rng.permutation(len(by_group))]
    wanted = max(1, round(val_fraction * len(indices)))
    chosen: list[int] = []
    taken = 0
    for group in shuffled:
        if taken < len(shuffled) - 1 and len(chosen) + len(group) <= wanted:
            chosen += group
            taken += 1
    return chosen or min(shuffled, key=len)
