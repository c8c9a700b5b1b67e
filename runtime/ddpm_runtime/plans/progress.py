"""What a builder is doing, on one line of a terminal.

Engines take seconds (TensorRT-RTX) to minutes (TensorRT) to build; this says how far it is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["ProgressLine", "monitor_for"]

_EVERY_S = 0.2


class ProgressLine:
    """Phases of a build as one line that overwrites itself; safe to call from any thread.

    Args:
        stream: where to write; nothing is written unless it is a terminal.
        clock: seconds, increasing.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._shows = stream.isatty()
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, int]] = {}
        self._begun = clock()
        self._last = -_EVERY_S

    def start(self, phase: str, steps: int) -> None:
        """A phase of so many steps began; phases nest."""
        with self._lock:
            self._phases[phase] = (0, steps)
            self._show()

    def step(self, phase: str, step: int) -> None:
        """A step of a phase is done, counting from 0."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase] = (step + 1, self._phases[phase][1])
                self._show()

    def finish(self, phase: str) -> None:
        """A phase ended; the line is wiped when none is left."""
        with self._lock:
            self._phases.pop(phase, None)
            if self._shows and not self._phases:
                self._stream.write("\r\x1b[K")
                self._stream.flush()

    def _show(self) -> None:
        now = self._clock()
        if not self._shows or now - self._last < _EVERY_S:
            return
        self._last = now
        parts = [f"{phase} {done}/{steps}" for phase, (done, steps) in self._phases.items()]
        line = f"{now - self._begun:5.0f} s  {' › '.join(parts)}"
        self._stream.write(f"\r\x1b[K{line[:100]}")
        self._stream.flush()


def monitor_for(module: Any, line: ProgressLine) -> Any:
    """An ``IProgressMonitor`` that feeds a line."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            line.start(phase, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            line.step(phase, step)
            return True  # False would stop the build

        def phase_finish(self, phase: str) -> None:
            line.finish(phase)

    return Monitor()
