"""Noise of every lane's present row, a few rows at a time.

NumPy's time on one small image is its number of calls, so the noise of 20 rows costs little more
than that of one. Noise is a pure function of (seed, index, draw): what is drawn ahead is what would
have been drawn, and lanes that come, go or change places only make it be drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .noise import fill_noise
from .program import SamplerProgram

__all__ = ["NoiseAhead"]

_VALUES_AHEAD = 1 << 14  # from here on a value costs the same, however many are drawn together


class DrawingLane(Protocol):
    """What must be known of a lane."""

    program: SamplerProgram
    row: int
    seed: int
    index: int


class NoiseAhead:
    """Row k of a lane's program gets draw k + 1 of its image.

    Args:
        capacity: lanes, ≥ 1.
        size: values of an image.
    """

    def __init__(self, capacity: int, size: int) -> None:
        self._normals = np.empty((max(capacity, _VALUES_AHEAD // size), size), np.float32)
        self._lanes: list[DrawingLane] = []
        self._rows: list[int] = []
        self._drawn = 0

    def present(self, lanes: Sequence[DrawingLane]) -> NDArray[np.float32]:
        """(lanes, size) float32, valid until the next call."""
        step = self._step(lanes)
        if step is None:
            self._draw(lanes)
            step = 0
        return self._normals[step * len(lanes) : (step + 1) * len(lanes)]

    def _step(self, lanes: Sequence[DrawingLane]) -> int | None:
        """How many rows after the first one drawn, if these lanes are there; else None."""
        step = lanes[0].row - self._rows[0] if self._rows else -1
        if not 0 <= step < self._drawn or len(lanes) != len(self._lanes):
            return None
        held = zip(lanes, self._lanes, self._rows, strict=True)
        same = all(lane is drawn and lane.row == row + step for lane, drawn, row in held)
        return step if same else None

    def _draw(self, lanes: Sequence[DrawingLane]) -> None:
        n = len(lanes)
        left = max(len(lane.program) - lane.row for lane in lanes)
        self._drawn = min(len(self._normals) // n, left)
        self._lanes, self._rows = list(lanes), [lane.row for lane in lanes]
        draws = (
            np.array(self._rows, np.uint32)
            + np.arange(1, self._drawn + 1, dtype=np.uint32)[:, None]
        )
        fill_noise(
            self._normals[: self._drawn * n],
            np.tile(np.array([lane.seed for lane in lanes], np.uint64), self._drawn),
            np.tile(np.array([lane.index for lane in lanes], np.uint64), self._drawn),
            draws.ravel(),
        )
