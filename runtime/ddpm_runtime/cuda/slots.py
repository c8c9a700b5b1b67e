"""The host's side of the lanes: which image is in which slot, and what the kernels are told of it.

Lanes move one row at a time and nothing but NaN stops them early, so the host knows every lane's
row without asking. Registers stay in their slot; only network rows are dealt out anew when lanes
come and go, so that the active ones are always at the front. Pure NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..program import SamplerProgram

__all__ = ["LaneRecord", "Slots"]


@dataclass(kw_only=True, eq=False)
class LaneRecord:
    """One image in flight.

    Args:
        tag: what ``start`` was given.
        program: the compiled sampler.
        rows: device address of its table.
        seed, index, label, guidance_scale: as given to ``start``.
        known, mask, initial: device addresses; 0 for none.
        row: the row to do next.
        failed: the first row that left NaN or infinity, −1 when none did.
        fresh: whether its registers are still to be filled.
    """

    tag: Any
    program: SamplerProgram
    rows: int
    seed: int
    index: int
    label: int
    guidance_scale: float
    known: int = 0
    mask: int = 0
    initial: int = 0
    row: int = 0
    failed: int = -1
    fresh: bool = True

    @property
    def rows_left(self) -> int:
        """Rows still to do."""
        return len(self.program) - self.row

    @property
    def guided(self) -> bool:
        """Whether it takes a second network row."""
        return self.guidance_scale != 1.0


class Slots:
    """Up to ``capacity`` lanes by slot."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.lanes: dict[int, LaneRecord] = {}

    @property
    def first_free(self) -> int:
        """The lowest slot that is free."""
        return next(slot for slot in range(self.capacity) if slot not in self.lanes)

    @property
    def network_rows(self) -> int:
        """Network rows the lanes take: one each, and one more for each that is guided."""
        return len(self.lanes) + sum(lane.guided for lane in self.lanes.values())

    @property
    def longest(self) -> int:
        """Rows until the last lane is done."""
        return max((lane.rows_left for lane in self.lanes.values()), default=0)

    def write(self, lanes: NDArray[np.void], progress: NDArray[np.void]) -> None:
        """Fill the arrays the kernels read; see layout.py. Slots without a lane have length 0."""
        lanes[:] = np.zeros(1, lanes.dtype)
        pair_row = len(self.lanes)
        progress["next"], progress["row"], progress["failed"] = 0, -1, -1
        for network_row, (slot, lane) in enumerate(sorted(self.lanes.items())):
            table = lane.program.table
            record = lanes[slot]
            for name in ("rows", "seed", "index", "known", "mask", "initial"):
                record[name] = getattr(lane, name)
            record["length"] = len(lane.program)
            record["registers"] = lane.program.registers
            record["network_row"] = network_row
            record["pair_row"] = pair_row if lane.guided else -1
            record["label"] = lane.label
            record["guidance_scale"] = lane.guidance_scale
            record["initial_scale"] = lane.program.initial_scale
            record["initial_signal"] = table.signal[0]
            record["initial_noise"] = table.noise[0]
            progress["next"][slot], progress["failed"][slot] = lane.row, lane.failed
            pair_row += lane.guided

    def segments(self, rows: int) -> list[tuple[bool, int]]:
        """The next rows as runs: (whether some lane asks the network, how many rows)."""
        asks = np.zeros(rows, np.bool_)
        distinct = {(id(lane.program), lane.row): lane for lane in self.lanes.values()}
        for lane in distinct.values():
            ahead = lane.program.table.evaluates[lane.row : lane.row + rows]
            asks[: len(ahead)] |= ahead
        starts = np.flatnonzero(np.diff(asks, prepend=~asks[:1]))
        lengths = np.diff(starts, append=rows)
        return [(bool(asks[a]), int(n)) for a, n in zip(starts, lengths, strict=True)]
