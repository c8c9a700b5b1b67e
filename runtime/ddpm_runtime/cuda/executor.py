"""The reverse diffusion loop on a CUDA device: HostLanes, with everything but the tags over there.

Registers, program tables, row counters, seeds and noise are in device memory. A row is: a kernel
that writes the network's inputs, the network, a kernel that does the row (update.cuh). ``advance``
puts a whole chunk of rows on the stream without once waiting for the device, at one of the graph
levels of levels.py, and waits for it at the end.

The arithmetic is HostLanes', operation for operation: given the same predictions, the same bits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, ConfigurationError, LifecycleError, OutOfDeviceMemoryError
from ..lanes import Known, check_fits
from ..program import MAX_REGISTERS, SamplerProgram
from .base import DeviceBackend
from .device import Device, Stream
from .kernels import load_kernels
from .levels import RowLoop
from .memory import LaneMemory
from .outbox import DeviceFinished, Outbox
from .row import DeviceRow
from .slots import LaneRecord, Slots
from .uploads import GivenImages, ProgramTables

__all__ = ["CudaLanes", "lanes_that_fit"]

_log = logging.getLogger("ddpm_runtime")

Float = NDArray[np.float32]

_MOST_LANES = 65_535  # blocks in a grid's second dimension


def lanes_that_fit(make: Callable[[int], CudaLanes], capacity: int) -> CudaLanes:
    """Make lanes; when the device's memory does not hold them, half as many, once.

    An image does not depend on how many lanes there are, so fewer lanes give the same images.

    Args:
        make: makes lanes of a capacity.
        capacity: how many to try first.

    Raises:
        OutOfDeviceMemoryError: half of them do not fit either.
    """
    try:
        return make(capacity)
    except OutOfDeviceMemoryError as error:
        if capacity == 1:
            raise
        half = capacity // 2
        _log.warning("%d lanes do not fit; going on with %d: %s", capacity, half, error)
    try:
        return make(half)
    except OutOfDeviceMemoryError as error:
        raise OutOfDeviceMemoryError(
            f"neither {capacity} nor {half} images at once fit on the device: {error}"
        ) from error


class CudaLanes:
    """Up to ``capacity`` images in flight on one device; the twin of ``lanes.HostLanes``.

    Not for several threads at once; any one thread may call.

    Args:
        device: the device; it stays the caller's.
        backend: the network, loaded on that device; it stays the caller's.
        capacity: lanes, ≥ 1. A class-conditional network gets twice as many rows, for guidance.
        graph_level: "auto", "L0", "L1" or "L2"; see levels.py.
        buckets: numbers of network rows to evaluate; the smallest that holds the lanes in flight is
            taken and the rest of its rows are padding. None means all the lanes, and twice that
            while lanes are guided. A library may round a row differently in another bucket: give
            one bucket for the same bits whatever shares the batch.
        registers: most registers a program may have.

    Attributes:
        around_chunk: entered, with the lanes' stream, while ``advance`` puts a chunk of rows on it:
            for measurements. What it enqueues as it is entered and left lies just before and just
            after the rows. After :meth:`warm_up` nothing in between waits for the device, so the
            stream may be held there.

    Raises:
        ConfigurationError: a bad capacity, bucket, level or number of registers.
        OutOfDeviceMemoryError: no room; nothing stays allocated.
        BackendError: no kernels for this device, or the network refuses.
    """

    def __init__(
        self,
        device: Device,
        backend: DeviceBackend,
        capacity: int,
        *,
        graph_level: str = "auto",
        buckets: Sequence[int] | None = None,
        registers: int = MAX_REGISTERS,
    ) -> None:
        if not 1 <= capacity <= _MOST_LANES:
            raise ConfigurationError(f"batch size must be in [1, {_MOST_LANES}]; got {capacity}.")
        if not 1 <= registers <= MAX_REGISTERS:
            raise ConfigurationError(f"registers must be in [1, {MAX_REGISTERS}]; got {registers}.")
        self.shape = shape = backend.shape
        self.capacity = capacity
        self.rows_done = 0  # over all lanes, since these were made
        self.around_chunk: Callable[[Stream], contextlib.AbstractContextManager[Any]]
        self.around_chunk = contextlib.nullcontext
        self._buckets = _checked_buckets(buckets, capacity, most=shape.rows_for(capacity))
        self._most_registers = registers
        self._device = device
        self._slots = Slots(capacity)
        self._stale = True  # the device's lane records are not the host's
        device.make_current()
        with ExitStack() as stack:
            self._stream = stream = stack.enter_context(device.stream())
            kernels = load_kernels(device, image_size=int(np.prod(shape.image)))
            stack.callback(kernels.close)
            self._memory = LaneMemory(
                device,
                stream,
                shape,
                capacity=capacity,
                network_rows=self._buckets[-1],
                registers=registers,
            )
            stack.callback(self._memory.close)
            binding = backend.bind(self._memory.buffers)
            stack.callback(binding.close)
            self._row = DeviceRow(stream, kernels, self._memory, binding, channels=shape.image[0])
            self._loop = RowLoop(device, stream, self._row, level=graph_level)
            stack.callback(self._loop.close)
            self._tables = ProgramTables(device, stream)
            stack.callback(self._tables.close)
            self._given = GivenImages(device, stream, capacity, shape.image)
            stack.callback(self._given.close)
            self._outbox = Outbox(device, stream, capacity, shape.image)
            stack.callback(self._outbox.close)
            self._owned: ExitStack | None = stack.pop_all()
        self._kernel_origin = kernels.origin

    @property
    def description(self) -> str:
        """Graph level and kernels in use, with the reasons."""
        return f"{self._loop.description}; kernels {self._kernel_origin}"

    @property
    def active(self) -> int:
        """Lanes in flight."""
        return len(self._slots.lanes)

    @property
    def free(self) -> int:
        """Lanes that may be started."""
        return self.capacity - self.active

    def warm_up(self) -> None:
        """Prepare the network and capture the graphs of every bucket, ahead of the first rows."""
        self._enter()
        for rows in self._buckets:
            self._loop.get_ready(rows)

    def start(
        self,
        program: SamplerProgram,
        *,
        seed: int,
        index: int,
        label: int | None = None,
        guidance_scale: float = 1.0,
        initial: Float | None = None,
        known: Known | None = None,
        tag: Any = None,
    ) -> None:
        """Begin an image; as :meth:`HostLanes.start <ddpm_runtime.lanes.HostLanes.start>`.

        Raises:
            LifecycleError: no lane is free, or the lanes are closed.
            ConfigurationError: a program that does not fit the network or the lanes.
            OutOfDeviceMemoryError: no room for the program's table or the given images.
        """
        self._enter()
        self._check_start(program, guidance_scale)
        slot = self._slots.first_free
        in_use = {lane.rows for lane in self._slots.lanes.values()}
        lane = LaneRecord(
            tag=tag,
            program=program,
            rows=self._tables.address(program, in_use),
            seed=seed,
            index=index,
            label=self.shape.num_classes if label is None else label,
            guidance_scale=guidance_scale,
        )
        if initial is not None:
            lane.initial = self._given.put(slot, "initial", initial)
        if known is not None:
            lane.known = self._given.put(slot, "known", known.image)
            lane.mask = self._given.put(slot, "mask", known.mask)
        self._slots.lanes[slot] = lane
        self._stale = True

    def advance(self, rows: int = 1, *, pixels: bool = False) -> list[DeviceFinished]:
        """Move every active lane up to ``rows`` rows; return the lanes that finished or failed.

        The host waits once, at the end. A lane that finishes on the way idles until then.

        Args:
            rows: the chunk, ≥ 1.
            pixels: hand out uint8 images, made on the device, instead of float32.

        Raises:
            BackendError: the network or the device failed; every lane keeps the state it had after
                the last row that was done.
        """
        if rows < 1:
            raise ConfigurationError(f"rows must be ≥ 1; got {rows}.")
        self._enter()
        if not self.active:
            return []
        rows = min(rows, self._slots.longest)
        self._flush()
        try:
            with self.around_chunk(self._stream):
                self._enqueue(rows)
        except BackendError:
            with contextlib.suppress(BackendError):  # the first failure is the one to report
                self._settle()
            raise
        self._settle(rows)
        return self._retire(pixels=pixels)

    def images(self) -> dict[Any, Float]:
        """x_t of every lane in flight, by tag: copies of shape (C, H, W), for previews."""
        self._enter()
        if not self.active:
            return {}
        self._flush()
        slots = sorted(self._slots.lanes)
        images = self._outbox.send(slots, self._row.gather, pixels=False).images
        self._given.settled()
        return {self._slots.lanes[slot].tag: images[i] for i, slot in enumerate(slots)}

    def cancel(self, unwanted: Callable[[Any], bool] = lambda tag: True) -> int:
        """Free every lane whose tag is unwanted; return how many."""
        slots = [slot for slot, lane in self._slots.lanes.items() if unwanted(lane.tag)]
        for slot in slots:
            del self._slots.lanes[slot]
            self._stale = True
        return len(slots)

    def close(self) -> None:
        """Release everything on the device; images handed out stay readable. Idempotent."""
        owned, self._owned = self._owned, None
        if owned is not None:
            self._device.make_current()
            self._slots.lanes.clear()
            with contextlib.suppress(
                BackendError
            ):  # a device that is lost is released all the same
                self._stream.synchronize()
            owned.close()

    def __enter__(self) -> CudaLanes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- the pieces ----------------------------------------------------------------------------

    def _enter(self) -> None:
        if self._owned is None:
            raise LifecycleError("these lanes are closed; make new ones before using them.")
        self._device.make_current()

    def _check_start(self, program: SamplerProgram, guidance_scale: float) -> None:
        if not self.free:
            raise LifecycleError(f"all {self.capacity} lanes are in flight; call advance() first.")
        check_fits(self.shape, program, guidance_scale)
        if program.registers > self._most_registers:
            raise ConfigurationError(
                f"the {program.sampler} program has {program.registers} registers; these lanes "
                f"have {self._most_registers}. Make them with registers={program.registers}."
            )

    def _flush(self) -> None:
        """Bring the device's lane records up to date, and fill the lanes that have just started."""
        if not self._stale:
            return
        self._slots.write(*self._memory.staging)
        fresh = [slot for slot, lane in sorted(self._slots.lanes.items()) if lane.fresh]
        self._memory.upload(fresh)
        if fresh:
            self._row.start(len(fresh))
        for slot in fresh:
            self._slots.lanes[slot].fresh = False
        self._stale = False

    def _enqueue(self, rows: int) -> None:
        """Put a chunk on the stream. Nothing in here waits for the device."""
        needed = self._slots.network_rows
        bucket = next(bucket for bucket in self._buckets if bucket >= needed)
        for asks_network, count in self._slots.segments(rows):
            if asks_network:
                self._loop.run(count, bucket)
            else:
                for _ in range(count):
                    self._row.enqueue(0, None)

    def _settle(self, rows: int | None = None) -> None:
        """Wait for the stream; take over the device's counters, which must show these rows."""
        progress = self._memory.read_progress()
        self._given.settled()
        for slot, lane in self._slots.lanes.items():
            found = progress[slot]
            expected = None if rows is None else min(lane.row + rows, len(lane.program))
            self.rows_done += int(found["next"]) - lane.row
            lane.row, lane.failed = int(found["next"]), int(found["failed"])
            if expected is not None and lane.failed < 0 and lane.row != expected:
                raise BackendError(
                    f"lane {slot} is at row {lane.row} where {expected} was asked. Use another "
                    f"graph level than {self._loop.description}, and report this."
                )

    def _retire(self, *, pixels: bool) -> list[DeviceFinished]:
        """Hand out the lanes that are done or have failed, and free them."""
        lanes = self._slots.lanes
        slots = [slot for slot in sorted(lanes) if not lanes[slot].rows_left]
        slots = sorted({*slots, *(slot for slot in lanes if lanes[slot].failed >= 0)})
        if not slots:
            return []
        gather = self._row.gather_pixels if pixels else self._row.gather
        batch = self._outbox.send(slots, gather, pixels=pixels)
        self._stale = True
        finished = []
        for i, slot in enumerate(slots):
            lane = lanes.pop(slot)
            failed_row = lane.failed if lane.failed >= 0 else None
            finished.append(DeviceFinished(lane.tag, failed_row, batch, i))
        return finished


def _checked_buckets(buckets: Sequence[int] | None, capacity: int, *, most: int) -> tuple[int, ...]:
    """Ascending numbers of network rows; the last holds everything."""
    if buckets is None:
        return tuple(sorted({capacity, most}))
    ascending = tuple(sorted(set(buckets)))
    if not ascending or ascending[0] < 1 or ascending[-1] < most:
        raise ConfigurationError(
            f"buckets must be ≥ 1 and the largest hold {most} network rows; got {list(buckets)}."
        )
    return ascending
