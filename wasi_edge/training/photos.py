"""Batches of pixels from the on-disk cache, for training (augmented) and for validation (as prediction sees them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wasi_edge.data.augment import augment
from wasi_edge.data.cache import PhotoCache
from wasi_edge.data.split import near_duplicate_groups, split
from wasi_edge.preprocess import center_view, normalise
from wasi_edge.preprocessing import Preprocessing
from wasi_edge.training.prepare import Prepared


@dataclass(frozen=True)
class PhotoSet:
    """One side of the split. `indices` into the cache, `labels` (n,) int64, `weight` (n,) of each photo in the loss.

    `batch`: photos at a time where nothing is trained. The plan counts on it: buffers never shrink again.
    """

    cache: PhotoCache
    indices: np.ndarray
    labels: Tensor
    weight: Tensor
    preprocessing: Preprocessing
    batch: int

    def __len__(self) -> int:
        return len(self.indices)

    def views(self, positions: Iterable[int]) -> np.ndarray:
        """Centre views (B, S, S, 3) uint8, the same pixels that prediction uses."""
        return np.stack([center_view(self.cache.read(int(self.indices[p])), self.preprocessing) for p in positions])

    def inputs(self, positions: Iterable[int]) -> Tensor:
        """What the network sees of the centre views: normalised, (B, 3, S, S) float32."""
        return torch.from_numpy(normalise(self.views(positions), self.preprocessing))

    def augmented(self, positions: Iterable[int], seed: int, epoch: int) -> Tensor:
        """Random crops and flips, keyed by (seed, epoch, photo), normalised: (B, 3, S, S) float32."""
        size = self.preprocessing.image_size
        views = [
            augment(self.cache.read(int(self.indices[p])), size, seed, epoch, int(self.indices[p])) for p in positions
        ]
        return torch.from_numpy(normalise(np.stack(views), self.preprocessing))


def split_photos(prepared: Prepared, cache: PhotoCache, earlier_hashes: set[int]) -> tuple[list[int], list[int]]:
    """Indices of training and validation photos: stratified, bursts and earlier training photos on one side."""
    groups = near_duplicate_groups(cache.hashes, cache.labels)
    train, val = split(cache.labels, groups, cache.parts, prepared.request.val_split, prepared.request.seed)
    if any(part == "val" for part in cache.parts):
        return [int(i) for i in train], [int(i) for i in val]
    known = {groups[i] for i in range(len(cache)) if cache.hashes[i] in earlier_hashes}
    moved = [int(i) for i in val if groups[i] in known]
    kept = Counter(cache.labels[int(i)] for i in val if groups[i] not in known)
    # a class whose held-out photos were all trained on before keeps them: a flattered figure beats none
    moved = [i for i in moved if kept[cache.labels[i]] > 0]
    return sorted([int(i) for i in train] + moved), [int(i) for i in val if int(i) not in set(moved)]
