"""Networks of timm, transformers and torchvision with random weights: what ours must agree with.

Where torchvision's binary does not fit the installed torch, its operators are only named: the libraries ask for them
when they are imported, and no network here calls them.
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import pytest
import torch

GRID = 2.0**-12


@cache
def timm() -> Any:
    """The library, or the test is skipped."""
    _name_operators()
    return pytest.importorskip("timm", reason="needs timm: pip install 'wasi-edge[dev]'")


@cache
def transformers() -> Any:
    """The library, or the test is skipped."""
    _name_operators()
    library = pytest.importorskip("transformers", reason="needs transformers: pip install 'wasi-edge[dev]'")
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library


@cache
def torchvision_models() -> Any:
    """torchvision.models, or the test is skipped."""
    _name_operators()
    return pytest.importorskip("torchvision.models", reason="needs torchvision: pip install 'wasi-edge[dev]'")


@cache
def _name_operators() -> Any:
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms", "roi_align"):
        with contextlib.suppress(RuntimeError):  # the real one is there
            library.define(f"{operator}(Tensor a, Tensor b, float c) -> Tensor")
    return library


def perturbed(model: Any, seed: int = 0) -> Any:
    """`model` in eval mode, every parameter moved away from where it was initialised.

    To multiples of 2^-12: sums and halves of two parameters, which a conversion may store, are then exact in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.05 if parameter.ndim > 1 else 0.2
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
            parameter.div_(GRID).round_().mul_(GRID)
    return model.eval()
