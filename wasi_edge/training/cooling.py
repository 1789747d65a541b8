"""Pausing while the processor is too hot (`--max-temp`)."""

from __future__ import annotations

import time
from collections.abc import Callable

from wasi_edge.memory.hardware import temperature_celsius
from wasi_edge.training.request import Events

_COOLER_BY = 5.0
_LOOK_EVERY_SECONDS = 5.0


class Cooler:
    """Between steps: above `limit` degrees Celsius, wait until five below. None, or no sensor: never."""

    def __init__(self, limit: float | None, events: Events) -> None:
        self._limit, self._events = limit, events

    def rest(self, stop_wanted: Callable[[], bool]) -> None:
        """Wait if need be, or until `stop_wanted`."""
        if self._limit is None:
            return
        now = temperature_celsius()
        if now is None or now <= self._limit:
            return
        self._events.message(f"{now:.0f} °C is above --max-temp {self._limit:.0f}: pausing to cool down")
        while now is not None and now > self._limit - _COOLER_BY and not stop_wanted():
            time.sleep(_LOOK_EVERY_SECONDS)
            now = temperature_celsius()
