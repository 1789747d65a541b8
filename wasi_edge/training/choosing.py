"""Which epoch's model is kept."""

from __future__ import annotations

import math


def is_kept(accuracy: float, loss: float, kept_accuracy: float, kept_loss: float, highest: float, photos: int) -> bool:
    """Whether a model takes the place of the one kept so far, both measured on the same held-out `photos`.

    The one-standard-error rule (Breiman et al. 1984): of all epochs whose accuracy is within one standard error of the
    `highest` so far, the one with the lowest loss. Of 130 photos at 90 % that error is 3 photos: what is ahead by
    fewer is ahead by luck, and each epoch that is looked at is another chance of it; the loss is of all photos.
    """
    highest = max(highest, accuracy)
    lowest = highest - math.sqrt(highest * (1 - highest) / photos)
    if accuracy < lowest:
        return False
    return kept_accuracy < lowest or (loss, -accuracy) < (kept_loss, -kept_accuracy)
