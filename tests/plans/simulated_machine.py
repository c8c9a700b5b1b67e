"""A machine with one simulated GPU and simulated inference libraries, for whole commands.

``install`` puts it under a test. ``simulated_gpu/sitecustomize.py`` puts it under every Python
process that finds that folder on PYTHONPATH: so a script is rehearsed as it stands, with all the
processes it starts.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))
from fake_tensorrt import FakeTensorRT
from simulated_library import (
    HostKernels,
    SimulatedDriver,
    host_kernels,
    simulated_ort_cuda,
    simulated_tensorrt,
)

import ddpm_runtime.backends.ort_cuda
import ddpm_runtime.backends.tensorrt
import ddpm_runtime.cuda.device
import ddpm_runtime.plans
from ddpm_runtime.errors import missing_extra
from ddpm_runtime.plans import LIBRARIES, library_of

__all__ = ["ALL_BUCKETS", "KERNELS", "host_kernels", "install", "install_here", "processes"]

ALL_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
KERNELS = "DDPM_SIMULATED_KERNELS"  # the folder of our kernels, built by g++
SIMULATED_GPU = Path(__file__).parent / "simulated_gpu"


def install(
    patch: Any,
    kernels: Any,
    folder: Path,
    *,
    libraries: Iterable[str] = ("tensorrt", "onnxruntime"),
    memory_bytes: int = 1 << 28,
) -> SimulatedDriver:
    """Give this process a GPU.

    Args:
        patch: a ``pytest.MonkeyPatch``.
        kernels: our kernels, built by g++.
        folder: for plans.
        libraries: what is installed, of "tensorrt" and "onnxruntime".
        memory_bytes: of the GPU.
    """
    driver = SimulatedDriver(kernels, sm=89, memory_bytes=memory_bytes)
    installed = set(libraries)

    def load_library(name: str) -> Any:
        if name not in installed:
            raise missing_extra(name, "build or run TensorRT plans", LIBRARIES[name])
        return library_of(fake)

    def open_tensorrt(
        bundle: Any, device: Any, *, library: Any, buckets: Any = None, **options: Any
    ) -> Any:
        options = {name: options[name] for name in options if name == "notice"}
        sizes = tuple(buckets or ALL_BUCKETS)
        return simulated_tensorrt("11.4", bundle, device, driver, folder, sizes, **options)

    def open_ort_cuda(bundle: Any, device: Any) -> Any:
        if "onnxruntime" not in installed:
            raise missing_extra("onnxruntime", "run an engine on a GPU", "gpu")
        return simulated_ort_cuda(bundle, device, driver, patch)

    fake = FakeTensorRT("11.4")
    patch.setattr(ddpm_runtime.cuda.device, "load_driver", driver.started)
    patch.setattr(ddpm_runtime.plans, "load_library", load_library)
    patch.setattr(ddpm_runtime.backends.tensorrt, "open_tensorrt", open_tensorrt)
    patch.setattr(ddpm_runtime.backends.tensorrt, "buckets_for", lambda rows: ALL_BUCKETS)
    patch.setattr(ddpm_runtime.backends.ort_cuda, "open_ort_cuda", open_ort_cuda)
    return driver


def processes(kernels_folder: Path, *folders: Path) -> dict[str, str]:
    """The environment that gives a process, and those it starts, the simulated GPU."""
    paths = [SIMULATED_GPU, *folders, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    return {
        **os.environ,
        KERNELS: str(kernels_folder),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }


def install_here() -> None:
    """What sitecustomize.py does."""
    import pytest

    built = Path(os.environ[KERNELS])
    plans_folder = tempfile.mkdtemp(prefix="simulated-plans-")
    atexit.register(shutil.rmtree, plans_folder, ignore_errors=True)
    kernels = HostKernels([built / "step.so", built / "loop.so"])
    install(pytest.MonkeyPatch(), kernels, Path(plans_folder))
