"""A network for a real GPU that needs no inference library: a DeviceBackend of one kernel."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from cuda.bindings import nvrtc

from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.cuda.base import DeviceBuffers
from ddpm_runtime.cuda.device import Device

SOURCE = Path(__file__).with_name("gpu_network.cu")


@cache
def compile_network(architecture: str) -> bytes:
    """Machine code ("sm_90") or PTX ("compute_90") of the network."""
    error, program = nvrtc.nvrtcCreateProgram(
        SOURCE.read_bytes(), SOURCE.name.encode(), 0, None, None
    )
    assert int(error) == 0
    options = [f"-arch={architecture}".encode(), b"-fmad=false"]
    assert int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]) == 0
    what = "CUBIN" if architecture.startswith("sm_") else "PTX"
    _, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    code = b" " * size
    getattr(nvrtc, f"nvrtcGet{what}")(program, code)
    return code


class GpuNetwork:
    """``networks.smooth_network`` as a DeviceBackend."""

    name, description, capture_safe = "test", "one kernel", True

    def __init__(
        self, device: Device, image: tuple[int, int, int], *, num_classes: int, learned: bool
    ) -> None:
        self.shape = NetworkShape(
            image=image,
            prediction_channels=image[0] * (2 if learned else 1),
            num_classes=num_classes,
        )
        self._driver = device.driver
        self._module = device.load(compile_network(f"sm_{device.sm}"))
        self._function = self._module.function("test_network")
        self._learned = learned

    def bind(self, buffers: DeviceBuffers) -> GpuNetwork:
        channels, height, width = self.shape.image
        self._size = channels * height * width
        self._arguments = (
            *map(ctypes.c_uint64, (buffers.sample, buffers.timestep)),
            *map(ctypes.c_uint64, (buffers.label, buffers.prediction)),
            *map(ctypes.c_uint32, (self._size, height * width, self._learned)),
        )
        return self

    def prepare(self, stream: int, rows: int) -> None:
        self.enqueue(stream, rows)

    def enqueue(self, stream: int, rows: int) -> None:
        pointers = (ctypes.c_void_p * 7)(*map(ctypes.addressof, self._arguments))
        blocks = -(-self._size // 128)
        place = ctypes.addressof(pointers)
        self._driver.call(
            "cuLaunchKernel", self._function, blocks, rows, 1, 128, 1, 1, 0, stream, place, 0
        )

    def close(self) -> None:
        pass
