"""A model folder as a classifier, run by torch. The only module of `inference` that imports torch.

It runs the network of training (`models/network.py`), so a prediction is the validation of that photo, to the
bit. Tensors are read one by one and widened to float32; a factored linear stays two factors.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import open_artefact
from wasi_edge.errors import ArtefactError
from wasi_edge.layers.saving import Pass
from wasi_edge.models.network import build_network
from wasi_edge.preprocess import normalise


class TorchClassifier:
    """Label probabilities of photos.

    labels          by class index
    preprocessing   how photos must come in
    """

    batch = 8

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """Read the model folder. `threads`: of torch, from here on; None leaves them as they are. Raises ArtefactError
        where the model is damaged or has no classifier."""
        if threads is not None:
            torch.set_num_threads(threads)
        with open_artefact(folder) as artefact:
            config, tensors = artefact.config, artefact.tensors
            if config.num_classes is None:
                raise ArtefactError(
                    f"{folder} has no classifier, only a backbone; "
                    f"fine-tune it first: wasi-edge finetune PHOTOS --model {folder}"
                )

            def read(name: str) -> Tensor:
                return torch.from_numpy(tensors.read(name, np.float32))

            self.labels = config.labels
            self.preprocessing = config.preprocessing
            self._network = build_network(
                config.geometry, config.linears, read, config.preprocessing.image_size, head=True
            )
        self._run = Pass()

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C)."""
        return self._logits(batch).numpy()

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) -> float32 (B, C), rows sum to 1."""
        return torch.softmax(self._logits(batch), dim=1).numpy()

    @torch.no_grad()
    def _logits(self, batch: np.ndarray) -> Tensor:
        return self._network.logits(torch.from_numpy(normalise(batch, self.preprocessing)), self._run)
