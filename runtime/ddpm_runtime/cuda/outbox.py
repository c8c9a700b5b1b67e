"""Finished images on their way to the host, while the device goes on with the next ones.

A kernel gathers x_t of the finished lanes (as float32, or already as uint8 pixels) into a tray on
the device; a stream of its own copies the tray to pinned memory. There are two trays, so a batch
may land while the next is gathered. An image is waited for when somebody reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LifecycleError
from .device import Device, Stream

__all__ = ["Batch", "DeviceFinished", "Outbox"]

Gather = Callable[[int, int, int], None]


class Batch:
    """Some images that were sent off together."""

    def __init__(self, tray: _Tray, kind: type[Any], shape: tuple[int, ...]) -> None:
        self.kind = kind
        self._tray: _Tray | None = tray
        self._shape = shape
        self._images: NDArray[Any] | None = None

    @property
    def images(self) -> NDArray[Any]:
        """The images, in the order of their slots; waits for the copy."""
        if self._tray is not None:
            tray, self._tray = self._tray, None
            tray.device.make_current()
            tray.landed.synchronize()
            self._images = tray.pinned.array(self.kind, self._shape).copy()
            tray.batch = None
        if self._images is None:
            raise LifecycleError("these images were lost: the lanes they came from have failed.")
        return self._images


class DeviceFinished:
    """A lane that reached the end of its program, or failed on the way; like ``lanes.Finished``.

    Args:
        tag: what ``start`` was given.
        failed_row: the row after which x_t held NaN or infinity; None when all went well.
        batch: the images it is among.
        position: its place there.
    """

    def __init__(self, tag: Any, failed_row: int | None, batch: Batch, position: int) -> None:
        self.tag = tag
        self.failed_row = failed_row
        self._batch = batch
        self._position = position

    @property
    def image(self) -> NDArray[np.float32]:
        """(C, H, W) float32, nominally in [−1, 1]; waits for the copy.

        Raises:
            LifecycleError: pixels were asked for.
        """
        return self._of_kind(np.float32, "advance()")

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, C) uint8, as ``images.to_uint8`` makes it; waits for the copy.

        Raises:
            LifecycleError: pixels were not asked for.
        """
        return self._of_kind(np.uint8, "advance(pixels=True)")

    def _of_kind(self, kind: type[Any], call: str) -> NDArray[Any]:
        if self._batch.kind is not kind:
            raise LifecycleError(f"this image came as {self._batch.kind.__name__}; use {call}.")
        image: NDArray[Any] = self._batch.images[self._position]
        return image


class Outbox:
    """Two trays and the stream that empties them.

    Args:
        device: the device.
        compute: the stream that the images are made on.
        capacity: images a tray holds.
        image: (C, H, W).
    """

    def __init__(
        self, device: Device, compute: Stream, capacity: int, image: tuple[int, int, int]
    ) -> None:
        self._compute = compute
        self._image = image
        with ExitStack() as stack:
            self._copies = stack.enter_context(device.stream())
            size_bytes = 4 * int(np.prod(image)) * capacity
            self._trays = [_Tray(device, stack, capacity, size_bytes) for _ in range(2)]
            self._owned = stack.pop_all()

    def send(self, slots: list[int], gather: Gather, *, pixels: bool) -> Batch:
        """Gather the images of some slots and start their copy to the host.

        Args:
            slots: which.
            gather: enqueues the kernel: (address of the slots, how many, address of the tray).
            pixels: whether it makes uint8 (H, W, C); else float32 (C, H, W).
        """
        self._trays.reverse()
        tray = self._trays[0]
        if tray.batch is not None:
            _ = tray.batch.images  # the tray's last batch must be off it
        channels, height, width = self._image
        shape = (len(slots), *((height, width, channels) if pixels else self._image))
        batch = Batch(tray, np.uint8 if pixels else np.float32, shape)
        wanted = tray.pinned_slots.array(np.int32, (len(slots),))
        wanted[:] = slots
        self._compute.copy_to_device(tray.slots.address, wanted)
        gather(tray.slots.address, len(slots), tray.memory.address)
        self._compute.record(tray.gathered)
        self._copies.wait(tray.gathered)
        self._copies.copy_to_host(
            tray.pinned.array(batch.kind, shape).reshape(-1), tray.memory.address
        )
        self._copies.record(tray.landed)
        tray.batch = batch
        return batch

    def close(self) -> None:
        """Let everything land, then release. Idempotent."""
        for tray in self._trays:
            if tray.batch is not None:
                _ = tray.batch.images
        self._owned.close()


class _Tray:
    """Room for one batch, on both sides."""

    def __init__(self, device: Device, stack: ExitStack, capacity: int, size_bytes: int) -> None:
        self.device = device
        self.memory = stack.enter_context(device.allocate(size_bytes))
        self.pinned = stack.enter_context(device.allocate_pinned(size_bytes))
        self.slots = stack.enter_context(device.allocate(4 * capacity))
        self.pinned_slots = stack.enter_context(device.allocate_pinned(4 * capacity))
        self.gathered = stack.enter_context(device.event())
        self.landed = stack.enter_context(device.event())
        self.batch: Batch | None = None
