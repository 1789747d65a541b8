"""What an exported `model.onnx` says of itself, in its metadata properties: a file alone is enough to predict with. No
torch, no onnx.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from wasi_edge.errors import ArtefactError
from wasi_edge.preprocessing import Preprocessing

ONNX_NAME = "model.onnx"
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class OnnxMetadata:
    """Everything about an exported model but its graph.

    labels                  by class index
    preprocessing           how photos must come in, or do within the graph
    weights                 `artefact.fingerprint` of what was exported
    includes_preprocessing  the graph takes upright photos uint8 (B, H, W, 3) and gives probabilities; otherwise it
                            takes normalised pixels (B, 3, S, S) and gives logits
    quantisation            what `--int8` measured, None without it
    """

    labels: tuple[str, ...]
    preprocessing: Preprocessing
    weights: str
    name: str = ""
    includes_preprocessing: bool = False
    provenance: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] | None = None
    quantisation: Mapping[str, Any] | None = None

    def to_properties(self) -> dict[str, str]:
        """As ONNX stores them: text by name, JSON where it is no plain text."""
        values = {
            "wasi_edge_schema": _SCHEMA_VERSION,
            "labels": list(self.labels),
            "preprocessing": self.preprocessing.to_dict(),
            "includes_preprocessing": self.includes_preprocessing,
            "provenance": dict(self.provenance),
            "training": None if self.training is None else dict(self.training),
            "quantisation": None if self.quantisation is None else dict(self.quantisation),
        }
        texts = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
        return {**texts, "name": self.name, "weights": self.weights}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], where: str) -> OnnxMetadata:
        """The inverse. ArtefactError, naming the file `where`, for what was not written here or by a newer version."""
        if "wasi_edge_schema" not in properties:
            raise ArtefactError(f"{where} was not made by wasi-edge: it does not say which labels its answers have")
        try:
            values = {key: json.loads(properties[key]) for key in _JSON_KEYS}
            if values["wasi_edge_schema"] > _SCHEMA_VERSION:
                raise ArtefactError(f"{where} was made by a newer wasi-edge; update this one")
            return cls(
                labels=tuple(str(label) for label in values["labels"]),
                preprocessing=Preprocessing.from_dict(values["preprocessing"]),
                weights=properties["weights"],
                name=properties["name"],
                includes_preprocessing=bool(values["includes_preprocessing"]),
                provenance=values["provenance"],
                training=values["training"],
                quantisation=values["quantisation"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(f"{where}: its metadata is damaged ({error}); export it again") from error


_JSON_KEYS = (
    "wasi_edge_schema", "labels", "preprocessing", "includes_preprocessing", "provenance", "training", "quantisation",
)  # fmt: skip
