"""Models of the Hugging Face hub: `hf:owner/name`, or `hf:owner/name@revision`. No torch.

The library that downloads (the extra `hub`) runs in a process of its own, because importing it takes some 40 MB that
would stay until the end of a conversion. Only configurations and tensors are fetched, into the library's own cache,
from which they come without a network the next time. No photo and nothing about them is ever sent.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from wasi_edge.children import python_command
from wasi_edge.errors import ArtefactError

PREFIX = "hf:"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CONFIGS = ["config.json", "preprocessor_config.json"]
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLES = ["pytorch_model.bin"]


def fetch(name: str) -> Path:
    """The folder of a model of the hub, downloaded if it is not there yet.

    Raises ArtefactError for what is no such name, without the library, without a network, and for a model that does not
    exist or needs a login.
    """
    if not _NAME.fullmatch(name):
        raise ArtefactError(f"{name} is no model of the hub; expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    environment = {**os.environ, "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = python_command("-m", "wasi_edge.models.hub", name)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise ArtefactError(f"{name}: the download ended without a result (exit code {done.returncode})") from None
    if "error" in answer:
        raise ArtefactError(f"{name}: {answer['error']}")
    return Path(answer["folder"])


def _download(name: str) -> dict[str, str]:
    match = _NAME.fullmatch(name)
    assert match, "fetch() looks first"
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        return {"error": 'models of the hub need an extra: pip install "wasi-edge[hub]"'}
    try:
        folder = snapshot_download(match[1], revision=match[2], allow_patterns=[*_CONFIGS, *_SAFETENSORS])
        if not any(Path(folder).glob("model*.safetensors")):
            folder = snapshot_download(match[1], revision=match[2], allow_patterns=[*_CONFIGS, *_PICKLES])
    except Exception as error:  # the library has a dozen kinds, and those of what it downloads with
        return {"error": _explained(error)}
    return {"folder": str(folder)}


def _explained(error: Exception) -> str:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "its owner asks for a login; accept the terms on the hub and run `hf auth login` first"
    if "RevisionNotFoundError" in kinds:
        return "there is no such revision"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such model on the hub, or it is private"
    if kinds & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
    }:
        return "it is not on this machine and the hub cannot be reached; connect once, or copy its folder here"
    return f"cannot be downloaded ({(str(error).splitlines() or [type(error).__name__])[0][:160]})"


if __name__ == "__main__":
    print(json.dumps(_download(sys.argv[1])))
