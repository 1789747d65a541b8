"""The ways to train, the rules by which weights move, how thoroughly, and what follows from each. No torch."""

from __future__ import annotations

import enum


class Method(enum.StrEnum):
    """How to train.

    wasi        weights in factors, gradients from compressed inputs
    wsi         weights in factors, inputs kept whole
    asi         dense weights, gradients from compressed inputs
    vanilla     dense weights under autograd, all of them trained
    lora        dense weights that stay, with trained low-rank updates of queries and values
    head        nothing but the classifier, in closed form
    """

    WASI = "wasi"
    WSI = "wsi"
    ASI = "asi"
    VANILLA = "vanilla"
    LORA = "lora"
    HEAD = "head"

    @property
    def has_factors(self) -> bool:
        """It trains factors; what a model of ours stores dense, because factors would be larger, it trains dense."""
        return self in (Method.WASI, Method.WSI)

    @property
    def has_dense_weights(self) -> bool:
        """Its weights have to be dense."""
        return self in (Method.ASI, Method.VANILLA, Method.LORA)

    @property
    def is_explicit(self) -> bool:
        """Trained by the explicit engine, with gradients P U^T; else by autograd, or not at all."""
        return self in (Method.WASI, Method.WSI, Method.ASI)


class Quality(enum.StrEnum):
    """How long a run is, so that nobody has to know what an epoch is (`training/defaults.py`).

    fast        six epochs
    default     as many, and up to twice as many where photos are few
    best        about three times as long as default
    """

    FAST = "fast"
    DEFAULT = "default"
    BEST = "best"


class Optimizer(enum.StrEnum):
    """By which rule the linears of the explicit engine move (`training/factor_update.py`).

    polar       the polar factor of momentum: steps of one length, relative to the weight
    sgd         the gradient itself, the paper's
    """

    POLAR = "polar"
    SGD = "sgd"
