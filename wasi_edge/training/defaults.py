"""Defaults chosen by measurement; `notes/LOG.md` has the figures behind each."""

from __future__ import annotations

from wasi_edge.method import Method, Optimizer, Quality

GRADIENT_RANK = 32
BATCH = 16
PATIENCE = 5
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
LABEL_SMOOTHING = 0.1
_DENSE_RATE = {"wasi": 0.25, "wsi": 0.25, "asi": 0.25, "vanilla": 1.0, "lora": 0.0, "head": 0.0}
_HEAD_RATE = {"wasi": 1.0, "wsi": 1.0, "asi": 1.0, "vanilla": 1.0, "lora": 1.0, "head": 0.0}
# Of their rate, for what comes before the first block: from block to block the share grows by the same factor, to 1.
STEM_RATE = {"wasi": 1 / 32, "wsi": 1 / 32, "asi": 1 / 32, "vanilla": 1.0, "lora": 1.0, "head": 1.0}
LORA_RANK = 16
# Share of the steps in which the learning rate rises. Steps of our rule are of one length however small the gradient:
# taken in full from the start they undo in the first epoch what the network knew.
WARM_UP = {"wasi": 0.4, "wsi": 0.4, "asi": 0.4, "vanilla": 0.1, "lora": 0.1, "head": 0.1}

# From so many steps on SGD is the rule: it ends ahead of ours after 1,600 and 4,200, level with it after 225, where it
# only undoes more on the way.
MANY_STEPS = 1000
# Its steps follow the gradient: another scale of rates, and none of the decay that goes with them.
_SGD_RATE, _SGD_DENSE_RATE, _SGD_HEAD_RATE = 0.3, 2e-4, 8e-4

# Optimiser steps that a run of each quality is as near to as whole epochs allow, and the epochs it stays between: few
# photos are seen more often, many of them less often.
_STEPS = {Quality.FAST: 0, Quality.DEFAULT: 200, Quality.BEST: 600}
_EPOCHS = {Quality.FAST: (6, 6), Quality.DEFAULT: (6, 12), Quality.BEST: (12, 24)}
# Of the blocks, those that learn, counted from the end: the others would at a small share of the rate, and without them
# as much is learned in two thirds of the time (`notes/LOG.md`).
TRAINED_SHARE = 1 / 2

_LEARNING_RATE = {"wasi": 1.2e-4, "wsi": 1.2e-4, "asi": 1.2e-4, "vanilla": 5e-5, "lora": 5e-4, "head": 0.0}


def epochs(method: Method, quality: Quality, num_train: int, batch: int) -> int:
    """Epochs of gradient steps over so many photos."""
    if method is Method.HEAD:
        return 0
    fewest, most = _EPOCHS[quality]
    steps = max(1, -(-num_train // batch))
    return min(most, max(fewest, round(_STEPS[quality] / steps)))


def optimizer(method: Method, steps: int, may_be_cut_short: bool) -> Optimizer:
    """For a run of so many steps."""
    many = method.is_explicit and steps >= MANY_STEPS and not may_be_cut_short
    return Optimizer.SGD if many else Optimizer.POLAR


def learning_rate(method: str, optimizer: Optimizer) -> float:
    """Before the schedule, which stays below one where the rise is long (`training/loop.py`)."""
    return _SGD_RATE if optimizer is Optimizer.SGD else _LEARNING_RATE[method]


def relative_rates(method: str, optimizer: Optimizer) -> tuple[float, float]:
    """Learning rates of norms, biases and embeddings, and of the classifier, relative to that of the weights."""
    if optimizer is Optimizer.SGD:
        return _SGD_DENSE_RATE, _SGD_HEAD_RATE
    return _DENSE_RATE[method], _HEAD_RATE[method]


def weight_decay(optimizer: Optimizer) -> float:
    """Relative to the learning rate."""
    return 0.0 if optimizer is Optimizer.SGD else WEIGHT_DECAY
