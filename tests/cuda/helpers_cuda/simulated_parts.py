"""What the simulated driver's handles stand for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cuda.bindings import driver as real

Code = real.CUresult


class DriverFailure(Exception):
    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


@dataclass(eq=False)
class Marker:
    """A place in a stream's queue."""

    stream: SimulatedStream
    passed: bool = False
    at: float = 0.0

    def reach(self) -> None:
        self.passed, self.at = True, time.perf_counter()


@dataclass(eq=False)
class SimulatedGraph:
    work: list[Callable[[], None]] = field(default_factory=list)
    condition: int | None = None
    body: SimulatedGraph | None = None


@dataclass(eq=False)
class SimulatedStream:
    queue: deque[Callable[[], None]] = field(default_factory=deque)
    captures_into: SimulatedGraph | None = None
    broken: bool = False

    def run(self, until: Marker | None = None) -> None:
        while self.queue and not (until and until.passed):
            self.queue.popleft()()


class NodeParameters:
    """Stands for CUgraphNodeParams, whose results only a driver can write."""

    def __init__(self) -> None:
        self.type: Any = None
        self.conditional = type("Conditional", (), {})()
