"""A model folder as one ONNX file. No torch; a weight at a time is in memory.

pixels (B, 3, S, S) float32, normalised  ->  logits (B, classes)             or, with preprocessing in the graph,
photos (B, H, W, 3) uint8, upright       ->  probabilities (B, classes)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from wasi_edge.artefact import Artefact, fingerprint
from wasi_edge.atomic import replacing
from wasi_edge.errors import ArtefactError
from wasi_edge.export.graph import Graph, outline, write_model
from wasi_edge.export.network import add_network
from wasi_edge.export.preprocessing import add_preprocessing
from wasi_edge.inference.onnx_metadata import OnnxMetadata


def write_onnx(
    artefact: Artefact,
    out: Path,
    with_preprocessing: bool = False,
    divisors: Mapping[str, np.ndarray] | None = None,
    more_outputs: Iterable[str] = (),
) -> OnnxMetadata:
    """Write `out`, whole or not at all; the graph has passed onnx's full check before a byte of it is there.

    `divisors`: as for `network.add_network`; `more_outputs`: values within the graph that come out too.

    Raises ArtefactError for a model without a classifier, one that no file can hold, preprocessing that the operators
    cannot do, and where `out` cannot be written.
    """
    config = artefact.config
    if config.num_classes is None:
        raise ArtefactError(
            f"{artefact.folder} has no classifier, only a backbone; "
            f"fine-tune it first: wasi-edge finetune PHOTOS --model {artefact.folder}"
        )
    size, graph = config.preprocessing.image_size, Graph()
    if with_preprocessing:
        photos = graph.input("photos", TensorProto.UINT8, ("batch", "height", "width", 3))
        pixels = add_preprocessing(graph, config.preprocessing, photos)
    else:
        pixels = graph.input("pixels", TensorProto.FLOAT, ("batch", config.geometry.channels, size, size))
    answer = add_network(
        graph, config.geometry, config.linears, artefact.tensors, size, config.num_classes, pixels, divisors
    )
    if with_preprocessing:
        answer = graph.op("Softmax", "probabilities", answer, axis=-1)
    graph.output(answer, TensorProto.FLOAT, ("batch", config.num_classes))
    for value in more_outputs:
        graph.output(value, TensorProto.FLOAT, ("batch", "tokens", "channels"))
    onnx.checker.check_model(outline(graph), full_check=True)
    metadata = OnnxMetadata(
        labels=tuple(config.labels),
        preprocessing=config.preprocessing,
        weights=fingerprint(artefact),
        name=config.name,
        includes_preprocessing=with_preprocessing,
        provenance=config.provenance,
        training=config.training,
    )
    with replacing(out) as file:
        write_model(file, graph, metadata.to_properties())
    return metadata
