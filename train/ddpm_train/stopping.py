"""SIGINT and SIGTERM end a run after the step in hand; a second SIGINT ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

__all__ = ["StopRequest", "stop_request"]


class StopRequest:
    """Which signal asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signal_number = number


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while the block runs (in the main thread; elsewhere, neither)."""
    request = StopRequest()
    previous: dict[int, object] = {}
    with contextlib.suppress(ValueError):  # signals can only be caught in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, request._handle)
    try:
        yield request
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)  # type: ignore[arg-type]
