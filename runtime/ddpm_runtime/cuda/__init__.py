"""Sampling on a CUDA device: the same loop as on the host, resident over there.

    with open_device(0) as device, CudaLanes(device, backend, capacity=64) as lanes:
        lanes.start(program, seed=0, index=0); lanes.advance(rows=len(program))

    base.py       the seam to an inference library on the device
    executor.py   CudaLanes, over slots.py (who is where), memory.py, row.py, uploads.py, outbox.py
    levels.py     how rows are put on the stream: L0, L1, L2, over graph.py
    update.cuh    the row itself, over portable_math.cuh; update.cu, the kernels
    kernels.py    machine code for this device, over compiler.py; build_kernels.py makes what ships
    driver.py     the driver's calls and errors; device.py, what is owned on a device

Nothing here is imported by ``import ddpm_runtime``, and cuda-bindings only when a device is opened.
"""

from ..errors import GraphError, OutOfDeviceMemoryError
from .base import DeviceBackend, DeviceBinding, DeviceBuffers
from .device import Device, open_device
from .executor import CudaLanes, lanes_that_fit
from .outbox import DeviceFinished

__all__ = [
    "CudaLanes",
    "Device",
    "DeviceBackend",
    "DeviceBinding",
    "DeviceBuffers",
    "DeviceFinished",
    "GraphError",
    "OutOfDeviceMemoryError",
    "lanes_that_fit",
    "open_device",
]
