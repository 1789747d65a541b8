"""Ctrl-C, SIGTERM (docker stop, systemd) and SIGHUP (a closed SSH session) ask a run to save and stop.

The handler only notes the signal; the run looks between two micro-batches. A second signal kills as usual.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNALS = [s for s in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, s)]


class StopSignals:
    """While entered, the first of the signals sets `received`; the earlier handlers come back with it."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # only the main thread may install handlers; elsewhere (tests, embedding) signals are the caller's
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name)
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._earlier:
            number, handler = self._earlier.popitem()
            signal.signal(number, handler)
