"""Where a model named on the command line lies. No torch.

A name is 'default' (the model inside this package), a folder written by `finetune` or `convert`, a folder of Hugging
Face or timm, or a model of the Hugging Face hub (`hf:owner/name`), the only one that is ever downloaded. Where a dense
checkpoint is wanted, a single file will do.
"""

from __future__ import annotations

from pathlib import Path

from wasi_edge.artefact import CONFIG_NAME, TENSORS_NAME, is_artefact, is_foreign_folder
from wasi_edge.errors import ArtefactError
from wasi_edge.models import hub

DEFAULT_NAME = "default"
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "default_model"


def resolve_source(name: str) -> Path:
    """The folder or the file of a checkpoint that can be converted. Raises ArtefactError where there is none."""
    path = Path(name)
    return path if path.is_file() else resolve_model(name)


def resolve_classifier(name: str) -> Path:
    """The folder of a model, or an exported file. Raises ArtefactError where there is none."""
    path = Path(name)
    return path if path.suffix.lower() == ".onnx" and path.is_file() else resolve_model(name)


def resolve_model(name: str) -> Path:
    """The folder of the model `name`. Raises ArtefactError where there is none.

    Only the kind of folder is looked at; whether its tensors are intact shows when they are opened.
    """
    if name == DEFAULT_NAME:
        if not is_artefact(DEFAULT_FOLDER):
            raise ArtefactError(
                f"the embedded default model is missing from {DEFAULT_FOLDER}: install wasi-edge again, "
                "or name a model folder with --model"
            )
        return DEFAULT_FOLDER
    if name.startswith(hub.PREFIX) and not Path(name).exists():
        return hub.fetch(name)
    folder = Path(name)
    if is_artefact(folder) or is_foreign_folder(folder):
        return folder
    expected = f"expected a folder with {CONFIG_NAME} and {TENSORS_NAME} (a run, a converted or Hugging Face model)"
    if not folder.exists():
        raise ArtefactError(f"{name}: no such model; {expected}, or '{DEFAULT_NAME}'")
    if not folder.is_dir():
        raise ArtefactError(
            f"{name} is a file; {expected}: name the folder that holds it, or convert it first: "
            f"wasi-edge convert {name} OUT"
        )
    if (folder / CONFIG_NAME).exists():
        raise ArtefactError(f"{folder / CONFIG_NAME} describes no model that is known here; {expected}")
    raise ArtefactError(f"{name} holds no {CONFIG_NAME}; {expected}; did the run finish its first epoch?")
