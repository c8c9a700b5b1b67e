"""A CUDA device and what is owned on it: memory, streams, events, modules.

    with open_device(0) as device:
        memory, stream, module = device.allocate(1024), device.stream(), device.load(cubin)

Every resource has ``close()``, which may be called twice, and is a context manager; using it
afterwards raises LifecycleError. A device closes what is still open on it, last made first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import BackendUnavailableError, LifecycleError
from .driver import Driver, load_driver

__all__ = [
    "Device",
    "DeviceMemory",
    "Event",
    "Module",
    "PinnedMemory",
    "Resource",
    "Stream",
    "open_device",
]

_Self = TypeVar("_Self", bound="Resource")


def open_device(ordinal: int = 0, *, driver: Driver | None = None) -> Device:
    """Open a device's primary context, which inference libraries share.

    Args:
        ordinal: its number, as CUDA_VISIBLE_DEVICES leaves it.
        driver: a started driver; None means the machine's.

    Raises:
        BackendUnavailableError: no bindings, no driver, too old a driver, or no such device.
    """
    return Device(driver or load_driver(), ordinal)


class Device:
    """One GPU; make it with :func:`open_device`.

    ``ordinal`` is the number it was opened with, ``sm`` its compute capability times ten.
    """

    def __init__(self, driver: Driver, ordinal: int) -> None:
        self.driver = driver
        self.ordinal = ordinal
        count = driver.call("cuDeviceGetCount", purpose="count the GPUs")
        if not 0 <= ordinal < count:
            raise BackendUnavailableError(
                f"device {ordinal} was asked for; this process sees {count} GPU(s). "
                "Choose a smaller number, or check CUDA_VISIBLE_DEVICES."
            )
        self._number = driver.call("cuDeviceGet", ordinal)
        self.name = driver.call("cuDeviceGetName", 128, self._number).split(b"\0")[0].decode()
        self.sm = 10 * self._capability("MAJOR") + self._capability("MINOR")
        self._resources: dict[int, Resource] = {}
        self._context: Any = driver.call(
            "cuDevicePrimaryCtxRetain", self._number, purpose=f"open {self.name}"
        )
        self.make_current()

    @property
    def context(self) -> Any:
        """The primary context.

        Raises:
            LifecycleError: the device is closed.
        """
        if self._context is None:
            raise LifecycleError("this device is closed; open it again with open_device().")
        return self._context

    def make_current(self) -> None:
        """Let the calling thread use this device."""
        self.driver.call("cuCtxSetCurrent", self.context)

    def allocate(self, size_bytes: int) -> DeviceMemory:
        """Memory on the device, not initialised.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        return DeviceMemory(self, size_bytes)

    def allocate_pinned(self, size_bytes: int) -> PinnedMemory:
        """Host memory the device can copy to and from by itself.

        Raises:
            OutOfDeviceMemoryError: there is not so much.
        """
        return PinnedMemory(self, size_bytes)

    def stream(self) -> Stream:
        """A new stream that does not wait for the default one."""
        return Stream(self)

    def event(self, *, timing: bool = False) -> Event:
        """A new event; ``timing`` lets :meth:`Event.elapsed_ms` read it."""
        return Event(self, timing=timing)

    def load(self, image: bytes) -> Module:
        """Load machine code.

        Raises:
            BackendError: code for another architecture, or not code at all.
        """
        return Module(self, image)

    def close(self) -> None:
        """Release everything on the device, then the device. Idempotent."""
        if self._context is None:
            return
        self.make_current()
        for resource in reversed(list(self._resources.values())):
            resource.close()
        self._context = None
        self.driver.call("cuDevicePrimaryCtxRelease", self._number)

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _capability(self, part: str) -> int:
        attribute = f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"
        kinds = self.driver.api.CUdevice_attribute
        value: int = self.driver.call(
            "cuDeviceGetAttribute", getattr(kinds, attribute), self._number
        )
        return value


class Resource:
    """Something the driver made: a handle, and the call that releases it."""

    release: str  # the driver's function

    def __init__(self, device: Device, handle: Any) -> None:
        self.device = device
        self._handle: Any = handle
        device._resources[id(self)] = self

    @property
    def handle(self) -> Any:
        """What the driver knows it by.

        Raises:
            LifecycleError: it is closed.
        """
        if self._handle is None:
            name = type(self).__name__
            raise LifecycleError(f"this {name} is closed; make a new one first.")
        return self._handle

    def close(self) -> None:
        """Release it. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            del self.device._resources[id(self)]
            self.device.driver.call(self.release, handle)

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class DeviceMemory(Resource):
    """Bytes on the device; make it with :meth:`Device.allocate`."""

    release = "cuMemFree"

    def __init__(self, device: Device, size_bytes: int) -> None:
        handle = device.driver.call(
            "cuMemAlloc", size_bytes, purpose=f"allocate {size_bytes:,} bytes on {device.name}"
        )
        super().__init__(device, handle)
        self.size_bytes = size_bytes

    @property
    def address(self) -> int:
        """Where it is, for kernels."""
        return int(self.handle)


class PinnedMemory(Resource):
    """Page-locked host bytes; make it with :meth:`Device.allocate_pinned`."""

    release = "cuMemFreeHost"

    def __init__(self, device: Device, size_bytes: int) -> None:
        handle = device.driver.call(
            "cuMemAllocHost", size_bytes, purpose=f"pin {size_bytes:,} bytes of host memory"
        )
        super().__init__(device, handle)
        self.size_bytes = size_bytes

    def array(self, dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
        """The first bytes as an array; it must not be used after ``close``."""
        raw: Any = (ctypes.c_uint8 * self.size_bytes).from_address(int(self.handle))
        values: NDArray[Any] = np.ndarray(shape, dtype, buffer=raw)
        return values


class Event(Resource):
    """A point in a stream; make it with :meth:`Device.event`."""

    release = "cuEventDestroy"

    def __init__(self, device: Device, *, timing: bool) -> None:
        flags = device.driver.api.CUevent_flags
        flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        super().__init__(device, device.driver.call("cuEventCreate", int(flag)))

    def synchronize(self) -> None:
        """Block until the device has passed this point."""
        self.device.driver.call("cuEventSynchronize", self.handle)

    def elapsed_ms(self, later: Event) -> float:
        """Milliseconds from this event to a later one; both made with ``timing``."""
        elapsed: float = self.device.driver.call("cuEventElapsedTime", self.handle, later.handle)
        return elapsed


class Module(Resource):
    """Loaded machine code; make it with :meth:`Device.load`."""

    release = "cuModuleUnload"

    def __init__(self, device: Device, image: bytes) -> None:
        purpose = f"load machine code on {device.name} (compute capability {device.sm / 10:.1f})"
        super().__init__(device, device.driver.call("cuModuleLoadData", image, purpose=purpose))

    def function(self, name: str) -> Any:
        """A kernel by name."""
        return self.device.driver.call("cuModuleGetFunction", self.handle, name.encode())


class Stream(Resource):
    """Work in order; every call but ``synchronize`` returns at once. See :meth:`Device.stream`."""

    release = "cuStreamDestroy"

    def __init__(self, device: Device) -> None:
        flag = device.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
        super().__init__(device, device.driver.call("cuStreamCreate", int(flag)))

    @property
    def address(self) -> int:
        """The stream as a number, as other libraries take it."""
        return int(self.handle)

    def copy_to_device(self, destination: int, source: NDArray[Any]) -> None:
        """Copy a contiguous host array; it must stay as it is until the stream has passed."""
        self.device.driver.call(
            "cuMemcpyHtoDAsync", destination, source.ctypes.data, source.nbytes, self.handle
        )

    def copy_to_host(self, destination: NDArray[Any], source: int) -> None:
        """Copy to a contiguous host array, to be read once the stream has passed."""
        self.device.driver.call(
            "cuMemcpyDtoHAsync", destination.ctypes.data, source, destination.nbytes, self.handle
        )

    def fill(self, destination: int, byte: int, size_bytes: int) -> None:
        """Set every byte."""
        self.device.driver.call("cuMemsetD8Async", destination, byte, size_bytes, self.handle)

    def fill_words(self, destination: int, word: int, count: int) -> None:
        """Set ``count`` 32-bit words."""
        self.device.driver.call("cuMemsetD32Async", destination, word, count, self.handle)

    def launch(
        self, function: Any, grid: tuple[int, int], threads: int, arguments: Sequence[Any]
    ) -> None:
        """Launch a kernel.

        Args:
            function: what :meth:`Module.function` returned.
            grid: blocks in x and y.
            threads: threads a block.
            arguments: ctypes values, one a parameter; the driver copies them at once.
        """
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.device.driver.call(
            "cuLaunchKernel",
            function,
            *(*grid, 1),
            *(threads, 1, 1),
            0,  # bytes of shared memory
            self.handle,
            ctypes.addressof(pointers),
            0,
        )

    def record(self, event: Event) -> None:
        """Mark this point."""
        self.device.driver.call("cuEventRecord", event.handle, self.handle)

    def wait(self, event: Event) -> None:
        """Let later work wait, on the device, until the event has passed."""
        self.device.driver.call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Block until the stream is empty."""
        self.device.driver.call("cuStreamSynchronize", self.handle)
