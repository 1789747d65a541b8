"""What the default model learns from: the dense network as it was, and EfficientNet-Lite2 of ImageNet, which has seen
labels of sharp photos. Both see the very pixels that the student sees, Lite2 larger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.accuracy.rivals import as_it_expects, network
from benchmarks.default_model.student import Sized

RIVAL, RIVAL_CLASSES, RIVAL_FEATURES = "lite2", 1000, 1280
# of a feature that hardly moves: of Lite2's, and of those that a head reads
_LEAST_DEVIATION, _LEAST_SPREAD = 1e-3, 1e-4


@dataclass(frozen=True)
class DenseTeacher:
    """`of_tokens`, `of_read`: variance of its tokens, and of what a head reads of them, over many photos: of the few of
    one step, mixed with each other, it may be next to nothing."""

    network: Sized
    of_tokens: float
    of_read: float

    @classmethod
    @torch.no_grad()
    def over(cls, network: Sized, pixels: Tensor) -> DenseTeacher:
        """With the variances over `pixels` (B, C, S, S)."""
        tokens, read = network.see(pixels)
        return cls(network, float(tokens.var()), float(read.var(0).mean()))

    def distance(self, seen: tuple[Tensor, Tensor], pixels: Tensor) -> Tensor:
        """Squared errors of all tokens, and of what a head reads, each relative to its variance."""
        with torch.no_grad():
            tokens, read = self.network.see(pixels)
        of_tokens = (seen[0] - tokens).square().mean() / self.of_tokens
        return of_tokens + (seen[1] - read).square().mean() / self.of_read


class ImageNetTeacher:
    """EfficientNet-Lite2. Raises ImportError where its packages are not installed."""

    def __init__(self) -> None:
        self._network: nn.Module = network(RIVAL).requires_grad_(False)

    @torch.no_grad()
    def answers(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (B, S, S, 3) -> logits (B, 1000), features (B, 1280)."""
        pixels = as_it_expects(views.permute(0, 3, 1, 2)).contiguous(memory_format=torch.channels_last)
        features = self._network.extract_features(pixels).mean((2, 3))
        return self._network._fc(features), features


class Readers(nn.Module):
    """Linear readers of what a head reads, thrown away in the end: Lite2's logits and features, labels of tiles."""

    def __init__(self, width: int, tile_classes: int) -> None:
        super().__init__()
        self.logits = nn.Linear(width, RIVAL_CLASSES)
        self.features = nn.Linear(width, RIVAL_FEATURES)
        self.tiles = nn.Linear(width, tile_classes)
        self.register_buffer("mean", torch.zeros(RIVAL_FEATURES))
        self.register_buffer("deviation", torch.ones(RIVAL_FEATURES))

    @torch.no_grad()
    def fit(self, read: Tensor, logits: Tensor, features: Tensor, penalty: float = 0.3) -> None:
        """Readers of Lite2 by ridge regression on `read` (n, F), relative to the spread of each feature."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0) + _LEAST_DEVIATION)
        mean, spread = read.mean(0), read.std(0) + _LEAST_SPREAD
        scaled = (read - mean) / spread
        gram = scaled.t() @ scaled + penalty * len(read) * torch.eye(read.shape[1])
        for reader, wanted in ((self.logits, logits), (self.features, self._standardised(features))):
            weight = torch.linalg.solve(gram, scaled.t() @ (wanted - wanted.mean(0))).t() / spread
            reader.weight.copy_(weight)
            reader.bias.copy_(wanted.mean(0) - weight @ mean)

    def distance(self, read: Tensor, logits: Tensor, features: Tensor) -> Tensor:
        """Kullback-Leibler divergence from Lite2's answer, and the squared error of its standardised features."""
        of_logits = F.kl_div(F.log_softmax(self.logits(read), 1), F.softmax(logits, 1), reduction="batchmean")
        return of_logits + (self.features(read) - self._standardised(features)).square().mean()

    def _standardised(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.deviation
