"""A whole batch on the device by us, with every backend and graph level: what is timed.

A TensorRT plan is built for the batch that is timed, with guidance and without; ``lanes=N`` has one
for guidance alone, and Engine without it one for all powers of two.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.bundle import Bundle
from ddpm_runtime.cuda import CudaLanes, DeviceBackend, lanes_that_fit
from ddpm_runtime.cuda.device import Device
from ddpm_runtime.cuda.runner import open_network
from ddpm_runtime.errors import (
    BackendError,
    DDPMError,
    NonFiniteError,
    OutOfDeviceMemoryError,
)
from ddpm_runtime.program import SamplerProgram

from .gpu_timing import ChunkTimer

__all__ = ["Networks", "OurBatch", "free_bytes"]

_HELD_ROWS = {"L0": 2}  # plain launches fill the device's queue, about 1,000 long
_HELD_ROWS_OTHERWISE = 8
_HELD_CHUNKS = 5

Pixels = NDArray[np.uint8]


def free_bytes(device: Device) -> int:
    """Memory of the device that nobody has."""
    free, _ = device.driver.call("cuMemGetInfo")
    return int(free)


class Networks:
    """The networks of one group of cases: opened once, for every graph level; close it.

    Args:
        device: where.
        batch: lanes.
    """

    def __init__(self, device: Device, batch: int) -> None:
        self.device, self.batch = device, batch
        self._opened: dict[tuple[str, str], _Opened] = {}
        self._refused: dict[tuple[str, str], DDPMError] = {}

    def lanes(
        self, bundle: Bundle, backend: str, level: str
    ) -> tuple[CudaLanes, str, dict[str, float | None]]:
        """Lanes that are warmed up, what runs in them, and milliseconds of the way there.

        Raises:
            DDPMError: the library is missing or refuses, or there is no room for so many lanes.
        """
        key = backend, bundle.manifest.network.precision
        if key in self._refused:
            raise self._refused[key]
        try:
            if key not in self._opened:
                self._opened[key] = _Opened(bundle, self.device, backend, self.batch)
            return self._opened[key].lanes(level)
        except DDPMError as error:
            if key not in self._opened or self._opened[key].unused:
                self._refused[key] = error  # the next level would only fail again, later
            raise

    def close(self) -> None:
        """Release the networks; their lanes must be closed before."""
        while self._opened:
            with suppress(BackendError):
                self._opened.popitem()[1].backend.close()


class _Opened:
    """One network, and what it cost."""

    def __init__(self, bundle: Bundle, device: Device, backend: str, batch: int) -> None:
        self._bundle, self._device, self._name, self._batch = bundle, device, backend, batch
        self._rows = tuple(sorted({batch, NetworkShape.from_bundle(bundle).rows_for(batch)}))
        self.unused = True
        self._notices: list[str] = []
        began = time.perf_counter()
        self.backend = self._open(self._notices)
        self._open_ms: float | None = 1e3 * (time.perf_counter() - began)

    def lanes(self, level: str) -> tuple[CudaLanes, str, dict[str, float | None]]:
        """Lanes of a level. The first time is the one that builds."""
        lanes, ready_ms = self._ready(self.backend, level)
        setup: dict[str, float | None] = {"open_ms": self._open_ms, "build_ms": None}
        if self._notices and self.unused:  # a plan was built: how long does loading it take?
            again_ms = self._load_again(level)
            setup["build_ms"], ready_ms = max(0.0, ready_ms - again_ms), again_ms
        self.unused, self._open_ms = False, None
        setup["load_ms"] = ready_ms
        return lanes, f"{self.backend.description}; {lanes.description}", setup

    def _open(self, notices: list[str]) -> DeviceBackend:
        return open_network(
            self._bundle, self._device, self._name, buckets=self._rows, notice=notices.append
        )

    def _ready(self, backend: DeviceBackend, level: str) -> tuple[CudaLanes, float]:
        began = time.perf_counter()
        lanes = lanes_that_fit(
            lambda capacity: CudaLanes(self._device, backend, capacity, graph_level=level),
            self._batch,
        )
        try:
            if lanes.capacity < self._batch:
                raise OutOfDeviceMemoryError(
                    f"the device holds {lanes.capacity} lanes of the {self._batch} asked for."
                )
            lanes.warm_up()
        except BaseException:
            lanes.close()
            raise
        return lanes, 1e3 * (time.perf_counter() - began)

    def _load_again(self, level: str) -> float:
        """From the plan cache, in a backend of its own."""
        backend = self._open([])
        try:
            lanes, ready_ms = self._ready(backend, level)
            lanes.close()
        finally:
            backend.close()
        return ready_ms


class OurBatch:
    """Draws the same batch again and again: everything from the seeds to the pixels on the host.

    Args:
        networks: of this group.
        bundle: the network, in the precision to be timed.
        backend: who runs it.
        level: the graph level.
        program: the sampler.
    """

    def __init__(
        self, networks: Networks, bundle: Bundle, backend: str, level: str, program: SamplerProgram
    ) -> None:
        device = networks.device
        free_before = free_bytes(device)
        self._program, self._level = program, level
        self._classes = bundle.manifest.network.num_classes
        self.rows_ms: list[float] = []  # per row, of every batch: what ``advance`` took
        with ExitStack() as stack:
            self._lanes, self.description, self.setup = networks.lanes(bundle, backend, level)
            stack.callback(self._lanes.close)
            self._timer = ChunkTimer(device)
            stack.callback(self._timer.close)
            began = time.perf_counter()
            self()
            self.setup["first_batch_ms"] = 1e3 * (time.perf_counter() - began)
            self._owned = stack.pop_all()
        self.memory_bytes = max(0, free_before - free_bytes(device))

    def __call__(self) -> Pixels:
        """One batch, (N, H, W, C) uint8.

        Raises:
            NonFiniteError: an image holds NaN or infinity: its speed would mean nothing.
            BackendError: the device or the library failed.
        """
        self._start()
        began = time.perf_counter()
        finished = self._lanes.advance(len(self._program), pixels=True)
        self.rows_ms.append(1e3 * (time.perf_counter() - began) / len(self._program))
        for lane in finished:
            if lane.failed_row is not None:
                raise NonFiniteError(
                    f"image {lane.tag} holds NaN or infinity after row {lane.failed_row}: this "
                    "precision does not hold the network's values."
                )
        return np.stack([lane.pixels for lane in sorted(finished, key=lambda lane: lane.tag)])

    def device_rows_ms(self) -> tuple[list[float], str]:
        """Milliseconds a row for which the device is busy, several times; and how they were taken.

        Raises:
            BackendError: the device or the library failed.
        """
        rows = min(_HELD_ROWS.get(self._level, _HELD_ROWS_OTHERWISE), len(self._program))
        try:
            found = [self._chunk_ms(rows, held=True) for _ in range(_HELD_CHUNKS + 1)][1:]
            if not self._timer.interrupted:
                return found, "events, the stream held until the rows were on it"
        except BackendError:  # a driver that cannot hold a stream; or worse, as will be seen now
            pass
        found = [self._chunk_ms(rows, held=False) for _ in range(_HELD_CHUNKS + 1)][1:]
        return found, "events, with the host's pauses: the stream could not be held"

    def close(self) -> None:
        """Release the lanes. Idempotent."""
        with suppress(BackendError):
            self._owned.close()

    def _chunk_ms(self, rows: int, *, held: bool) -> float:
        self._start()
        usual = self._lanes.around_chunk
        self._lanes.around_chunk = self._timer.held if held else self._timer.span
        try:
            self._lanes.advance(rows)
            return self._timer.elapsed_ms() / rows
        finally:
            self._lanes.around_chunk = usual
            self._lanes.cancel()

    def _start(self) -> None:
        for index in range(self._lanes.free):
            label: Any = index % self._classes if self._classes else None
            self._lanes.start(self._program, seed=0, index=index, label=label, tag=index)
