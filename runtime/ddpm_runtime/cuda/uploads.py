"""What goes to the device when a lane starts: program tables, and images that are given.

Copies run in stream order; the host arrays are kept until the caller says the stream has passed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..program import SamplerProgram
from .device import Device, DeviceMemory, Stream
from .layout import pack_rows

__all__ = ["GivenImages", "ProgramTables"]

_KEPT_TABLES = 64


class ProgramTables:
    """Program tables on the device, each uploaded once and kept while it may be of use."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._tables: dict[int, tuple[SamplerProgram, DeviceMemory, NDArray[np.void]]] = {}

    def address(self, program: SamplerProgram, in_use: set[int]) -> int:
        """Where a program's rows are.

        Args:
            program: the program; uploaded if it is not there yet.
            in_use: addresses that must stay.

        Raises:
            ConfigurationError: a table the kernels cannot run; see ``pack_rows``.
            OutOfDeviceMemoryError: no room.
        """
        key = id(program)
        if key not in self._tables:
            self._forget_some(in_use)
            rows = pack_rows(program)
            memory = self._device.allocate(rows.nbytes)
            self._stream.copy_to_device(memory.address, rows)
            self._tables[key] = program, memory, rows
        self._tables[key] = self._tables.pop(key)  # the latest used is the last
        return self._tables[key][1].address

    def close(self) -> None:
        """Release the tables. Idempotent."""
        while self._tables:
            _, (_, memory, _) = self._tables.popitem()
            memory.close()

    def _forget_some(self, in_use: set[int]) -> None:
        for key in list(self._tables)[: max(0, len(self._tables) + 1 - _KEPT_TABLES)]:
            if self._tables[key][1].address not in in_use:
                self._tables.pop(key)[1].close()


class GivenImages:
    """Initial, known and mask images of every slot; memory is taken when the first one comes."""

    PLANES = ("initial", "known", "mask")

    def __init__(
        self, device: Device, stream: Stream, capacity: int, image: tuple[int, int, int]
    ) -> None:
        self._device, self._stream = device, stream
        self._capacity, self._image = capacity, image
        self._memory: DeviceMemory | None = None
        self._copying: list[NDArray[Any]] = []

    def put(self, slot: int, plane: str, image: NDArray[np.float32]) -> int:
        """Copy an image to a slot's plane; return its address.

        Raises:
            OutOfDeviceMemoryError: no room.
        """
        image_bytes = 4 * int(np.prod(self._image))
        if self._memory is None:
            self._memory = self._device.allocate(3 * self._capacity * image_bytes)
        at = (3 * slot + self.PLANES.index(plane)) * image_bytes
        values = np.array(np.broadcast_to(image, self._image), np.float32, order="C")
        self._copying.append(values)
        self._stream.copy_to_device(self._memory.address + at, values)
        return self._memory.address + at

    def settled(self) -> None:
        """Say that the stream has passed every copy."""
        self._copying.clear()

    def close(self) -> None:
        """Release the memory. Idempotent."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None
