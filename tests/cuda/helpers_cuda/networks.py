"""Networks for both executors: any function, on the host or as a simulated device library."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.cuda.base import DeviceBuffers

from .simulator import SimulatedDriver

F = np.float32


def smooth_network(num_classes: int = 0, prediction_channels: int | None = None) -> Callable:
    """Adds and multiplies only, so that a row's answer has the same bits in any batch."""

    def network(sample, timestep, label):
        t = timestep[:, None, None, None] * F(1e-3)
        answer = sample * F(0.9) + sample[:, :, ::-1, ::-1] * F(0.1) * t + t * F(0.05)
        if num_classes:
            answer = answer + label.astype(F)[:, None, None, None] * F(0.02)
        channels = prediction_channels or sample.shape[1]
        if channels > sample.shape[1]:
            v = np.clip(F(0.3) - answer * F(0.5), -1, 1)
            answer = np.concatenate([answer, v], axis=1)
        return answer

    return network


def at(address: int, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Memory at an address as an array."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ndarray(shape, dtype, buffer=(ctypes.c_uint8 * count).from_address(address))


class SimulatedBackend:
    """A Python function as a library on the simulated device: a DeviceBackend."""

    name, description = "simulated", "Python function on a simulated device"

    def __init__(
        self,
        driver: SimulatedDriver,
        function: Callable,
        image: tuple[int, int, int],
        *,
        num_classes: int = 0,
        prediction_channels: int | None = None,
        capture_safe: bool = True,
    ) -> None:
        self.driver, self.function, self.capture_safe = driver, function, capture_safe
        self.shape = NetworkShape(
            image=image,
            prediction_channels=prediction_channels or image[0],
            num_classes=num_classes,
        )
        self.prepared: list[int] = []
        self.enqueued: list[int] = []
        self.bindings = 0
        self.refuse: Exception | None = None  # raised by the next enqueue
        self.synchronises = False
        self.safe_once_prepared = capture_safe

    def bind(self, buffers: DeviceBuffers) -> SimulatedBinding:
        self.bindings += 1
        return SimulatedBinding(self, buffers)

    def close(self) -> None:
        pass


class SimulatedBinding:
    def __init__(self, backend: SimulatedBackend, buffers: DeviceBuffers) -> None:
        self.backend, self.buffers = backend, buffers
        self.capture_safe = backend.capture_safe
        self.open = True

    def prepare(self, stream: int, rows: int) -> None:
        assert rows not in self.backend.prepared
        self.backend.prepared.append(rows)
        self.capture_safe = self.backend.safe_once_prepared
        self._put_on(stream, rows)
        self.backend.driver._call("cuStreamSynchronize", stream)

    def enqueue(self, stream: int, rows: int) -> None:
        assert rows in self.backend.prepared, "prepare() comes before the first enqueue()"
        refusal, self.backend.refuse = self.backend.refuse, None
        if refusal is not None:
            raise refusal
        if self.backend.synchronises:
            self.backend.driver._call("cuStreamSynchronize", stream)
        self.backend.enqueued.append(rows)
        self._put_on(stream, rows)

    def _put_on(self, stream: int, rows: int) -> None:
        shape, buffers = self.backend.shape, self.buffers
        assert rows <= buffers.rows
        image = shape.image

        def work() -> None:
            label = np.zeros(rows, np.int64)
            if shape.num_classes:
                label = at(buffers.label, np.int64, (rows,))
            answer = self.backend.function(
                at(buffers.sample, np.float32, (rows, *image)),
                at(buffers.timestep, np.float32, (rows,)),
                label,
            )
            at(buffers.prediction, np.float32, answer.shape)[...] = answer

        self.backend.driver.host_function(stream, work)

    def close(self) -> None:
        if self.open:
            self.open = False
            self.backend.bindings -= 1
