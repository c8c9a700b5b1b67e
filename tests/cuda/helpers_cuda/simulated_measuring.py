"""The simulated driver's events, clocks and counters: what a measurement asks of a driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as real

from .simulated_parts import Code, DriverFailure, Marker

PATIENCE_S = 20.0


class Measuring:
    """The part of ``SimulatedDriver`` that a measurement needs."""

    handles: dict[int, Any]
    memory: dict[int, Any]
    memory_bytes: int
    _keep: Callable[[Any], int]
    _drop: Callable[[Any], None]
    _enqueue: Callable[[Any, Callable[[], None]], None]
    _inside: Callable[[int, int], None]

    def _cuDeviceGetPCIBusId(self, length, device):
        return b"0000:00:00.0".ljust(length, b"\0")

    def _cuMemGetInfo(self):
        used = sum(size for _, size, kind in self.memory.values() if kind == "device")
        return self.memory_bytes - used, self.memory_bytes

    def _cuMemHostGetDevicePointer(self, pointer, flags):
        assert flags == 0
        assert any(address == int(pointer) for address in self.memory)
        return int(pointer)

    def _cuMemcpyDtoDAsync(self, destination, source, size, stream):
        self._inside(destination, size)
        self._inside(source, size)
        self._enqueue(stream, lambda: ctypes.memmove(destination, source, size))

    def _cuStreamWaitValue32(self, stream, address, value, flags):
        """A stream that is held: nothing after this runs before somebody writes the value."""
        assert flags == int(real.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ)
        assert self.handles[int(stream)].captures_into is None
        word = ctypes.c_uint32.from_address(int(address))

        def work() -> None:
            end = time.perf_counter() + PATIENCE_S
            while word.value < value:
                assert time.perf_counter() < end, "the stream is held and nobody lets it go"
                time.sleep(0.001)

        self._enqueue(stream, work)

    def _cuEventCreate(self, flags):
        timing = not flags & int(real.CUevent_flags.CU_EVENT_DISABLE_TIMING)
        return self._keep({"marker": None, "timing": timing})

    def _cuEventDestroy(self, event):
        self._drop(event)

    def _cuEventRecord(self, event, stream):
        marker = Marker(self.handles[int(stream)])
        self.handles[int(event)]["marker"] = marker
        self._enqueue(stream, marker.reach)

    def _cuEventSynchronize(self, event):
        marker = self.handles[int(event)]["marker"]
        if marker is not None:
            marker.stream.run(until=marker)

    def _cuEventElapsedTime(self, earlier, later):
        events = [self.handles[int(event)] for event in (earlier, later)]
        if any(event["marker"] is None or not event["timing"] for event in events):
            raise DriverFailure(Code.CUDA_ERROR_INVALID_HANDLE)
        if not all(event["marker"].passed for event in events):
            raise DriverFailure(Code.CUDA_ERROR_NOT_READY)
        began, ended = (event["marker"].at for event in events)
        return 1e3 * (ended - began)
