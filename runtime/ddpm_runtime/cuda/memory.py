"""Everything the lanes hold on the device, allocated once: graphs keep these addresses."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends.base import NetworkShape
from .base import DeviceBuffers
from .device import Device, Stream
from .layout import LANE, PROGRESS, State

__all__ = ["LaneMemory"]


class LaneMemory:
    """Registers, lane records, counters and the network's inputs and outputs.

    Args:
        device: where.
        stream: the stream that works on them.
        shape: the network's tensors.
        capacity: lanes.
        network_rows: rows of the network's buffers.
        registers: registers a lane.

    Raises:
        OutOfDeviceMemoryError: no room; nothing stays allocated.
    """

    def __init__(
        self,
        device: Device,
        stream: Stream,
        shape: NetworkShape,
        *,
        capacity: int,
        network_rows: int,
        registers: int,
    ) -> None:
        size = int(np.prod(shape.image))
        prediction_size = size // shape.image[0] * shape.prediction_channels
        self._stream = stream
        with ExitStack() as stack:

            def zeroed(size_bytes: int) -> int:
                memory = stack.enter_context(device.allocate(size_bytes))
                stream.fill(memory.address, 0, size_bytes)
                return memory.address

            def pinned(dtype: np.dtype[Any], count: int) -> NDArray[Any]:
                memory = stack.enter_context(device.allocate_pinned(dtype.itemsize * count))
                return memory.array(dtype, (count,))

            self.buffers = DeviceBuffers(
                rows=network_rows,
                sample=zeroed(4 * size * network_rows),
                timestep=zeroed(4 * network_rows),
                label=zeroed(8 * network_rows) if shape.num_classes else 0,
                prediction=zeroed(4 * prediction_size * network_rows),
            )
            self.state = State(
                lanes=zeroed(LANE.itemsize * capacity),
                progress=zeroed(PROGRESS.itemsize * capacity),
                registers=zeroed(4 * size * capacity * registers),
                sample=self.buffers.sample,
                timestep=self.buffers.timestep,
                label=self.buffers.label,
                prediction=self.buffers.prediction,
                rows_left=zeroed(4),
                capacity=capacity,
                size=size,
                prediction_size=prediction_size,
                num_classes=shape.num_classes,
            )
            self.fresh = zeroed(4 * capacity)
            self._lanes = pinned(LANE, capacity)
            self._progress = pinned(PROGRESS, capacity)
            self._fresh = pinned(np.dtype(np.int32), capacity)
            self._seen = pinned(PROGRESS, capacity)
            self._settled = stack.enter_context(device.event())
            self._owned = stack.pop_all()

    @property
    def staging(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Pinned lane records and counters, to be filled and then uploaded."""
        return self._lanes, self._progress

    def upload(self, fresh: list[int]) -> None:
        """Copy the staged records and counters, and the slots to be filled, to the device."""
        self._stream.copy_to_device(self.state.lanes, self._lanes)
        self._stream.copy_to_device(self.state.progress, self._progress)
        if fresh:
            self._fresh[: len(fresh)] = fresh
            self._stream.copy_to_device(self.fresh, self._fresh[: len(fresh)])

    def read_progress(self) -> NDArray[Any]:
        """Wait for the stream; return every slot's counters."""
        self._stream.copy_to_host(self._seen, self.state.progress)
        self._stream.record(self._settled)
        self._settled.synchronize()
        return self._seen

    def close(self) -> None:
        """Release everything. Idempotent."""
        self._owned.close()
