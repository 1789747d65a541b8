"""The studies' code, written for the CPU, with its tensors on an accelerator: for hundreds of runs in minutes.

Torch's factory functions are replaced by ones that make tensors there. What is drawn from a generator is drawn on the
CPU as ever, so a run starts from the same numbers and visits the same photos; sums are rounded in another order. Small
decompositions go to LAPACK and back, which is faster. It holds for the whole process and cannot be undone.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FACTORIES = ("empty", "zeros", "ones", "eye", "arange", "full", "tensor", "randn", "randint")
_DECOMPOSITIONS = ("qr", "eigh", "cholesky", "cholesky_ex", "solve_ex", "solve_triangular", "svd")
# of a matrix's smaller side, up to which LAPACK is the faster
_SMALL = 80
# rows at a time in norms, activations and the head, and photos at a time in attention and conversion
_ROWS, _PHOTOS = 1 << 17, 64


def compute_on(device: str) -> None:
    """Make every tensor on `device`, 'cuda' or 'cuda:1' say, from here on. Call it in a process of its own, before its
    first tensor."""
    torch.set_num_threads(1)
    for name in _FACTORIES:
        setattr(torch, name, _placed(getattr(torch, name), device))
    from_numpy, numpy, to_empty = torch.from_numpy, Tensor.numpy, torch.nn.Module.to_empty
    torch.from_numpy = lambda array: from_numpy(array).to(device)
    Tensor.numpy = lambda self: numpy(self.detach().cpu())  # type: ignore[method-assign, assignment]
    torch.nn.Module.to_empty = lambda self, **_: to_empty(self, device=device)  # type: ignore[method-assign, assignment]
    Tensor.uniform_ = _drawn(Tensor.uniform_)  # type: ignore[method-assign]
    for name in _DECOMPOSITIONS:
        setattr(torch.linalg, name, _by_lapack(getattr(torch.linalg, name), device))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    _widen_chunks()


def name_of(device: str) -> str:
    """What the maker calls it; asked in a process of its own, because one that knows keeps memory there.

    Raises RuntimeError where torch cannot use it.
    """
    ask = f"import torch; print(torch.cuda.get_device_name({device!r}))"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode:
        raise RuntimeError(f"torch cannot use the device {device}: {found.stderr.strip().splitlines()[-1]}")
    return found.stdout.strip()


def _placed(make: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    def placed(*args: Any, **options: Any) -> Tensor:
        if options.get("generator") is not None:
            return make(*args, **{**options, "device": "cpu"}).to(device)
        return make(*args, **{**options, "device": options.get("device") or device})

    return placed


def _drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def drawn(self: Tensor, *bounds: float, generator: torch.Generator | None = None) -> Tensor:
        if generator is None:
            return draw(self, *bounds)
        return self.copy_(draw(self.cpu(), *bounds, generator=generator))

    return drawn


def _by_lapack(decompose: Callable[..., Any], device: str) -> Callable[..., Any]:
    def decomposed(matrix: Tensor, *more: Any, **options: Any) -> Any:
        if "out" in options or min(matrix.shape[-2:]) > _SMALL:
            return decompose(matrix, *more, **options)
        there = [other.cpu() if isinstance(other, Tensor) else other for other in more]
        result = decompose(matrix.cpu(), *there, **options)
        return result.to(device) if isinstance(result, Tensor) else type(result)([part.to(device) for part in result])

    return decomposed


def _widen_chunks() -> None:
    """What is done a few rows at a time to stay in a cache, all at once; attention by its textbook path, as the fused
    kernels are the CPU's."""
    from wasi_edge.conversion import walk
    from wasi_edge.layers import activation, attention, norm, workspace
    from wasi_edge.training import head

    norm.NORM_ROWS = activation.GELU_ROWS = head.HEAD_ROWS = _ROWS  # type: ignore[attr-defined]
    walk.conversion_photos = lambda numbers: _PHOTOS  # type: ignore[attr-defined]
    attention.attention_photos = lambda tokens, ample: _PHOTOS  # type: ignore[attr-defined]
    attention.attention_forward.__defaults__ = (False, None)
    workspace.drop_pages = lambda address, size: False  # type: ignore[attr-defined]
