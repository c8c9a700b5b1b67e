"""The GPU that was measured: what it is, what runs on it, and what it can do at best.

``python -m ddpm_bench.gpu_machine`` prints it as JSON; without a GPU, one line and exit code 1.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

import click

from ddpm_runtime.cuda.device import Device, open_device
from ddpm_runtime.errors import DDPMError

__all__ = ["gpu_facts", "main", "matmul_gflops"]

_LIBRARIES = (
    *("cuda-bindings", "tensorrt", "tensorrt-rtx", "onnxruntime", "onnxruntime-gpu"),
    *("nvidia-cudnn-cu13", "nvidia-cublas", "torch", "triton", "onnx"),
)
_QUERIES = {
    "driver": "driver_version",
    "clock_sm_mhz": "clocks.sm",
    "clock_sm_most_mhz": "clocks.max.sm",
    "clock_memory_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}
_SIZES = {"fp32": 4096, "fp16": 8192, "bf16": 8192}
_TRIES = 10


def gpu_facts(device: Device) -> dict[str, Any]:
    """Name, compute capability, memory, driver, clocks, libraries; plain JSON values."""
    call = device.driver.call
    cuda = int(call("cuDriverGetVersion"))
    _, total = call("cuMemGetInfo")
    attributes = device.driver.api.CUdevice_attribute
    processors = attributes.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    number = call("cuDeviceGet", device.ordinal)
    bus = call("cuDeviceGetPCIBusId", 32, number).split(b"\0")[0].decode()
    return {
        "name": device.name,
        "compute_capability": f"{device.sm / 10:.1f}",
        "multiprocessors": int(call("cuDeviceGetAttribute", processors, number)),
        "memory_bytes": int(total),
        "cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        **_asked_of_nvidia_smi(bus),
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def matmul_gflops(torch: Any) -> dict[str, float]:
    """GFLOP/s of a large matrix product on the GPU, by precision: the best of several, by events.

    Args:
        torch: from ``gpu_torch.cuda_torch``.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    kinds = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    found = {}
    with torch.no_grad():
        for name, kind in kinds.items():
            size = _SIZES[name]
            a, b = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
            found[name] = 2 * size**3 / _least_ms(torch, lambda a=a, b=b: torch.mm(a, b)) / 1e6
    torch.cuda.empty_cache()
    return found


def main() -> int:
    """Print the facts; the exit code."""
    try:
        with open_device() as device:
            click.echo(json.dumps(gpu_facts(device)))
    except DDPMError as error:
        click.echo(f"error: {error}", err=True)
        return 1
    return 0


def _least_ms(torch: Any, work: Any) -> float:
    work()
    best = float("inf")
    for _ in range(_TRIES):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        best = min(best, float(began.elapsed_time(ended)))
    return best


def _asked_of_nvidia_smi(bus: str) -> dict[str, str]:
    """Driver, clocks and power limit, where the tool is there and answers; else nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    query = f"--query-gpu={','.join(_QUERIES.values())}"
    words = [tool, query, "--format=csv,noheader,nounits", f"--id={bus}"]
    try:
        said = subprocess.run(  # noqa: S603  # fixed words, an absolute program
            words, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said.strip().split(",")]
    return dict(zip(_QUERIES, values, strict=False))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
