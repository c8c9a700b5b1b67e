"""One row on the stream: kernel, network, kernel."""

from __future__ import annotations

import ctypes
from typing import Any

from .base import DeviceBinding
from .device import Stream
from .kernels import THREADS, Kernels
from .memory import LaneMemory

__all__ = ["DeviceRow"]


class DeviceRow:
    """Launches the kernels over one set of lanes.

    Args:
        stream: where everything goes.
        kernels: the loaded kernels.
        memory: what they work on.
        binding: the network, bound to the same memory.
        channels: channels of an image.
    """

    def __init__(
        self,
        stream: Stream,
        kernels: Kernels,
        memory: LaneMemory,
        binding: DeviceBinding,
        *,
        channels: int,
    ) -> None:
        self._stream, self._kernels, self._memory = stream, kernels, memory
        self._binding = binding
        self._channels = channels

    @property
    def capture_safe(self) -> bool:
        """See ``levels.RowWork``."""
        return self._binding.capture_safe

    def prepare(self, network_rows: int) -> None:
        """See ``levels.RowWork``."""
        self._binding.prepare(self._stream.address, network_rows)

    def prepare_loop(self) -> None:
        """See ``levels.RowWork``."""
        self._kernels.load_loop()

    def enqueue(self, network_rows: int, condition: int | None) -> None:
        """See ``levels.RowWork``. 0 network rows leave the network out."""
        if condition is None:
            self._launch(self._kernels.advance)
        else:
            self._launch(self._kernels.advance_loop, ctypes.c_uint64(condition))
        if network_rows:
            self._binding.enqueue(self._stream.address, network_rows)
        self._launch(self._kernels.update)

    def set_rows_left(self, rows: int) -> None:
        """See ``levels.RowWork``."""
        self._stream.fill_words(self._memory.state.rows_left, rows, 1)

    def start(self, lanes: int) -> None:
        """Fill the registers of the first ``lanes`` slots listed in ``memory.fresh``."""
        self._launch(self._kernels.start, ctypes.c_uint64(self._memory.fresh), lanes=lanes)

    def gather(self, slots: int, lanes: int, out: int) -> None:
        """x_t of the slots listed at an address, as (lanes, C, H, W) float32."""
        self._launch(
            self._kernels.collect, ctypes.c_uint64(slots), ctypes.c_uint64(out), lanes=lanes
        )

    def gather_pixels(self, slots: int, lanes: int, out: int) -> None:
        """The same as (lanes, H, W, C) uint8."""
        self._launch(
            self._kernels.pixels,
            *(ctypes.c_uint64(slots), ctypes.c_uint64(out), ctypes.c_uint32(self._channels)),
            lanes=lanes,
        )

    def _launch(self, function: Any, *arguments: Any, lanes: int | None = None) -> None:
        """Over all lanes the kernels do several elements a thread, over listed ones one."""
        state = self._memory.state
        blocks = self._kernels.blocks(state.size, wide=lanes is None)
        grid = (blocks, state.capacity if lanes is None else lanes)
        self._stream.launch(function, grid, THREADS, (state, *arguments))
