"""Lanes between calls: taken, used by one thread, given back.

Making lanes on a device takes memory and captures graphs, so they are kept. They stay with the
thread that made them, because some libraries keep their graphs by thread. What was used longest
ago is closed first, and everything idle when the device runs out of memory.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from .errors import LifecycleError, OutOfDeviceMemoryError
from .runner import Lanes, Runner

__all__ = ["LanePool"]

_MOST_IDLE = 8

_Key = tuple[threading.Thread, int]


class LanePool:
    """The lanes of one runner.

    Args:
        runner: makes them; closed with the pool.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._lock = threading.Lock()
        self._idle: OrderedDict[_Key, Lanes] = OrderedDict()
        self._lent: dict[int, _Key] = {}  # by id of the lanes
        self._making = 0
        self._closed = False

    def take(self, capacity: int) -> Lanes:
        """Lanes of this capacity for the calling thread; give them back.

        Raises:
            LifecycleError: the pool is closed.
            OutOfDeviceMemoryError, BackendError: see ``Runner.lanes``.
        """
        key = (threading.current_thread(), capacity)
        with self._lock:
            self.require_open()
            lanes = self._idle.pop(key, None)
            if lanes is not None:
                self._lent[id(lanes)] = key
                return lanes
            self._making += 1
        made: Lanes | None = None
        try:
            made = self._make(capacity)
            return made
        finally:
            with self._lock:
                self._making -= 1
                if made is not None:
                    self._lent[id(made)] = key
                self._close_if_unused()

    def require_open(self) -> None:
        """Refuse a pool that is closed.

        Raises:
            LifecycleError: it is.
        """
        if self._closed:
            raise LifecycleError("this engine is closed; load it again with Engine.load().")

    def give_back(self, lanes: Lanes) -> None:
        """Put lanes back, free; after ``close`` they are closed."""
        lanes.cancel()
        with self._lock:
            key = self._lent.pop(id(lanes))
            if key in self._idle:  # a thread that drew from two streams at once
                self._drop([key])
            self._idle[key] = lanes
            gone = [key for key in self._idle if not key[0].is_alive()]
            surplus = len(self._idle) - len(gone) - _MOST_IDLE
            gone += [key for key in self._idle if key not in gone][: max(0, surplus)]
            self._drop(list(self._idle) if self._closed else gone)
            self._close_if_unused()

    def close(self) -> None:
        """Close what is idle, and the runner once nothing is lent. Idempotent."""
        with self._lock:
            already, self._closed = self._closed, True
            if not already:
                self._drop(list(self._idle))
                self._close_if_unused()

    def _make(self, capacity: int) -> Lanes:
        try:
            return self.runner.lanes(capacity)
        except OutOfDeviceMemoryError:
            with self._lock:
                if not self._idle:
                    raise
                self._drop(list(self._idle))
        return self.runner.lanes(capacity)

    def _drop(self, keys: list[_Key]) -> None:
        for key in keys:
            self._idle.pop(key).close()

    def _close_if_unused(self) -> None:
        if self._closed and not self._lent and not self._making:
            self.runner.close()
