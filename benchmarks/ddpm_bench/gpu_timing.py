"""What the device itself took: CUDA events on the lanes' own stream, around a chunk of rows.

Events around work that the host is still putting on the stream also count the time in which the
device had nothing to do. So the stream is *held*: it waits at a word in memory until the whole
chunk lies on it, then it is let go, and what the events then tell is the time the device was busy.

    hold ─ event ─ row ─ row ─ … ─ row ─ event      then: let go, and wait
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from ddpm_runtime.cuda.device import Device, Stream
from ddpm_runtime.errors import BackendError

__all__ = ["ChunkTimer", "host_gap_share"]

_PATIENCE_S = 2.0
_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ


class ChunkTimer:
    """Times chunks; give ``span`` or ``held`` to ``CudaLanes.around_chunk``.

    Args:
        device: where the lanes are.
        patience_s: let a held stream go after this long, whatever happens. Two things need it: a
            library that waits for the device, and a queue that is full.
    """

    def __init__(self, device: Device, *, patience_s: float = _PATIENCE_S) -> None:
        self.interrupted = False  # the last held chunk was let go before it was all on the stream
        self._device = device
        self._patience_s = patience_s
        self._begin, self._end = device.event(timing=True), device.event(timing=True)
        self._pinned = device.allocate_pinned(4)
        self._word = self._pinned.array(np.uint32, (1,))

    @contextmanager
    def span(self, stream: Stream) -> Iterator[None]:
        """From the first row's beginning to the last one's end, the host's pauses included."""
        stream.record(self._begin)
        yield
        stream.record(self._end)

    @contextmanager
    def held(self, stream: Stream) -> Iterator[None]:
        """The rows alone: nothing of the chunk begins before all of it is on the stream.

        Raises:
            BackendError: this device cannot hold a stream.
        """
        call = self._device.driver.call
        self._word[0] = 0
        self.interrupted = False
        address = call("cuMemHostGetDevicePointer", int(self._pinned.handle), 0)
        watchdog = threading.Timer(self._patience_s, self._let_go)
        watchdog.daemon = True
        call("cuStreamWaitValue32", stream.handle, address, 1, _GREATER_OR_EQUAL)
        watchdog.start()
        try:
            stream.record(self._begin)
            yield
            stream.record(self._end)
        finally:
            self.interrupted = bool(self._word[0])
            watchdog.cancel()
            self._let_go()

    def elapsed_ms(self) -> float:
        """Of the last chunk, once the host has waited for it."""
        return self._begin.elapsed_ms(self._end)

    def close(self) -> None:
        """Release the events. Idempotent."""
        with suppress(BackendError):  # a device that is lost has nothing to give back
            for resource in (self._begin, self._end, self._pinned):
                resource.close()

    def _let_go(self) -> None:
        self._word[0] = 1


def host_gap_share(device_ms: float, wall_ms: float) -> float:
    """The share of the time in which the device waited for the host: 1 − busy / wall.

    Args:
        device_ms: what the device was busy for.
        wall_ms: what the same work took on the host's clock, > 0.

    Returns:
        In (−∞, 1]; a little below 0 where there is no gap, for the two are measured apart.
    """
    return 1.0 - device_ms / wall_ms
