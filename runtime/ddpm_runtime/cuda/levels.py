"""How rows are put on the stream: graph levels L0, L1, L2.

    L0  plain launches: every kernel of every row by its own call
    L1  one graph a row: network and update replayed by one call a row
    L2  the whole chunk by one call: a WHILE node whose body is a row; where a driver or a network
        does not take one, a graph of several rows

``auto`` takes the highest level that works and says in ``report`` why the ones above it did not; an
asked level never falls back.
"""

from __future__ import annotations

import logging
from typing import Protocol

from ..errors import BackendError, ConfigurationError, GraphError, choose
from .device import Device, Stream
from .graph import DeviceGraph

__all__ = ["LEVELS", "UNROLLED_ROWS", "RowLoop", "RowWork"]

_log = logging.getLogger("ddpm_runtime")

UNROLLED_ROWS = 8  # rows in one graph where there is no WHILE node

LEVELS = {"L0": ("plain",), "L1": ("row",), "L2": ("while", "unrolled")}
_AUTOMATIC = ("while", "unrolled", "row", "plain")
_NAMES = {
    "plain": "L0, plain launches",
    "row": "L1, one graph a row",
    "unrolled": f"L2, one graph for {UNROLLED_ROWS} rows",
    "while": "L2, one graph with a conditional loop",
}


class RowWork(Protocol):
    """What a row is made of; every call returns at once."""

    @property
    def capture_safe(self) -> bool:
        """Whether the network can be captured into our graph."""

    def prepare(self, network_rows: int) -> None:
        """Get the network ready for so many rows; may synchronise, is never captured."""

    def prepare_loop(self) -> None:
        """Load the head of a conditional loop; never captured.

        Raises:
            BackendError: this driver has no such loops.
        """

    def enqueue(self, network_rows: int, condition: int | None) -> None:
        """Put one row on the stream; with a condition, as body of a loop that counts rows."""

    def set_rows_left(self, rows: int) -> None:
        """Set the loop's count, in stream order."""


class RowLoop:
    """Runs rows at a graph level, capturing what it needs the first time.

    Args:
        device: where they run.
        stream: the stream everything is enqueued on.
        work: a row.
        level: "auto", or one of :data:`LEVELS`.

    Raises:
        ConfigurationError: unknown level, or one this network cannot be run at.
    """

    def __init__(self, device: Device, stream: Stream, work: RowWork, *, level: str) -> None:
        choose("graph level", level, ["auto", *LEVELS])
        self._device, self._stream, self._work = device, stream, work
        self._asked = level
        self._modes = list(LEVELS.get(level, _AUTOMATIC))
        self.report: list[str] = []
        self._prepared: set[int] = set()
        self._graphs: dict[tuple[str, int], DeviceGraph] = {}
        self._check_capture_safe()

    @property
    def description(self) -> str:
        """The level in use, and why not a higher one."""
        reasons = f" ({'; '.join(self.report)})" if self.report else ""
        return _NAMES[self._modes[0]] + reasons

    def get_ready(self, network_rows: int) -> None:
        """Prepare the network and capture the graphs for so many rows, if that is still to do.

        Raises:
            GraphError: an asked level cannot be had.
            BackendError: the network refuses.
        """
        if network_rows not in self._prepared:
            self._work.prepare(network_rows)
            self._check_capture_safe()  # some libraries know only once they have run
            self._prepared.add(network_rows)
        while True:
            mode = self._modes[0]
            try:
                self._capture(mode, network_rows)
                return
            except BackendError as error:
                self._downgrade(mode, error)

    def run(self, rows: int, network_rows: int) -> None:
        """Put ``rows`` rows on the stream, the network evaluating ``network_rows`` in each."""
        self.get_ready(network_rows)
        mode = self._modes[0]
        if mode == "plain":
            for _ in range(rows):
                self._work.enqueue(network_rows, None)
            return
        if mode == "while":
            self._work.set_rows_left(rows)
            self._graphs["while", network_rows].launch(self._stream)
            return
        several = rows // UNROLLED_ROWS if mode == "unrolled" else 0
        for _ in range(several):
            self._graphs["unrolled", network_rows].launch(self._stream)
        for _ in range(rows - several * UNROLLED_ROWS):
            self._graphs["row", network_rows].launch(self._stream)

    def close(self) -> None:
        """Release the graphs. Idempotent."""
        while self._graphs:
            _, graph = self._graphs.popitem()
            graph.close()

    def _check_capture_safe(self) -> None:
        """A network that cannot be captured leaves plain launches; see base.DeviceBinding."""
        if self._work.capture_safe or self._modes == ["plain"]:
            return
        if self._asked != "auto":
            raise ConfigurationError(
                f"graph level {self._asked} was asked, but this network runs in a CUDA graph of "
                "its own or cannot be captured into ours; use level auto or L0."
            )
        self.report.append("the network cannot be captured into our CUDA graph")
        self._modes = ["plain"]

    def _capture(self, mode: str, network_rows: int) -> None:
        """Make the graphs a mode needs for so many network rows."""
        if mode == "while":
            self._keep("while", network_rows, rows=1)
        if mode in ("row", "unrolled"):
            self._keep("row", network_rows, rows=1)
        if mode == "unrolled":
            self._keep("unrolled", network_rows, rows=UNROLLED_ROWS)

    def _keep(self, mode: str, network_rows: int, *, rows: int) -> None:
        if (mode, network_rows) in self._graphs:
            return
        if mode == "while":
            self._work.prepare_loop()
        graph = DeviceGraph(self._device, loop=mode == "while")
        try:
            graph.begin_capture(self._stream)
            condition = graph.condition if mode == "while" else None
            for _ in range(rows):
                self._work.enqueue(network_rows, condition)
            graph.end_capture()
            graph.instantiate(self._stream)
        except BaseException:
            graph.close()
            raise
        self._graphs[mode, network_rows] = graph

    def _downgrade(self, mode: str, error: BackendError) -> None:
        """Leave a mode that did not work, and say so; raise if there is no other."""
        self.report.append(f"not {_NAMES[mode]}: {error}")
        _log.warning("CUDA graph: not %s: %s", _NAMES[mode], error)
        del self._modes[0]
        if not self._modes:
            raise GraphError(
                f"graph level {self._asked} was asked and cannot be had: {'; '.join(self.report)}. "
                "Use level auto or L0."
            ) from error
        for key in [key for key in self._graphs if key[0] == mode]:
            self._graphs.pop(key).close()
