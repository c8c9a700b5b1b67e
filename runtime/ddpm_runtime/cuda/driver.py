"""``cuda.bindings.driver`` with its results unpacked, and its errors made ours in one place.

The library is imported by :func:`load_driver`, never at import time. What is owned on a device
(memory, streams, modules) lives in device.py.
"""

from __future__ import annotations

from typing import Any

from ..errors import (
    BackendError,
    BackendUnavailableError,
    GraphError,
    OutOfDeviceMemoryError,
    missing_extra,
)

__all__ = ["MINIMUM_DRIVER", "Driver", "load_driver"]

MINIMUM_DRIVER = 13000  # CUDA 13.0: the first driver that loads machine code of CUDA 13

_UPDATE = "Update the NVIDIA driver to release 580 or newer."
_REBUILD = "Build the kernels for this GPU with: python -m ddpm_runtime.cuda.build_kernels"
_LOST = (
    "The device's state in this process is lost: start the process again, and run it under "
    "compute-sanitizer to find the access at fault."
)
_REMEDIES: dict[str, tuple[type[BackendError], str]] = {
    "CUDA_ERROR_OUT_OF_MEMORY": (
        OutOfDeviceMemoryError,
        "Choose a smaller batch size, or free memory that other processes hold on this GPU.",
    ),
    "CUDA_ERROR_NO_DEVICE": (
        BackendUnavailableError,
        "No GPU is visible: check CUDA_VISIBLE_DEVICES and nvidia-smi, or use device='cpu'.",
    ),
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": (
        BackendUnavailableError,
        "The driver's library and kernel module are of different versions: restart the machine.",
    ),
    "CUDA_ERROR_STUB_LIBRARY": (
        BackendUnavailableError,
        "A stub libcuda was loaded: take the toolkit's stubs directory out of LD_LIBRARY_PATH.",
    ),
    "CUDA_ERROR_NO_BINARY_FOR_GPU": (BackendError, _REBUILD),
    "CUDA_ERROR_INVALID_IMAGE": (BackendError, _REBUILD),
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": (BackendError, _UPDATE),
    "CUDA_ERROR_ILLEGAL_ADDRESS": (BackendError, _LOST),
    "CUDA_ERROR_LAUNCH_FAILED": (BackendError, _LOST),
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": (
        GraphError,
        "Something that a CUDA graph cannot hold was enqueued: use graph level L0.",
    ),
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": (
        GraphError,
        "An earlier call broke the capture: use graph level L0.",
    ),
}


class Driver:
    """The functions of a ``cuda.bindings.driver`` module.

    Args:
        api: the module, or an object with its functions.
    """

    def __init__(self, api: Any) -> None:
        self.api = api

    def call(self, name: str, *arguments: Any, purpose: str = "") -> Any:
        """Call one function; return what it returns beside the status.

        Args:
            name: the function ("cuMemAlloc").
            *arguments: its arguments.
            purpose: what it was for, for the message ("allocate 3.0 MiB").

        Returns:
            None, the one value, or a tuple of values.

        Raises:
            OutOfDeviceMemoryError, GraphError, BackendUnavailableError, BackendError: the driver
                answered with an error; the message has its name and a remedy.
        """
        try:
            status, *values = getattr(self.api, name)(*arguments)
        except (RuntimeError, AttributeError) as error:  # no libcuda, or one without this function
            raise BackendUnavailableError(
                f"the NVIDIA driver does not offer {name}: {str(error).rstrip('.')}. Install an "
                "NVIDIA driver of release 580 or newer, or use device='cpu'."
            ) from error
        if int(status) != 0:
            raise self._error(name, status, purpose)
        return values[0] if len(values) == 1 else tuple(values) or None

    def _error(self, call: str, status: Any, purpose: str) -> BackendError:
        name, text = (self._describe(f, status) for f in ("cuGetErrorName", "cuGetErrorString"))
        default = (GraphError if "Graph" in call or "Capture" in call else BackendError, "")
        kind, remedy = _REMEDIES.get(name, default)
        wanted = f"cannot {purpose}: " if purpose else ""
        return kind(f"{wanted}{call} answered {name} ({text}). {remedy}".rstrip())

    def _describe(self, function: str, status: Any) -> str:
        _, text = getattr(self.api, function)(status)
        return text.decode() if isinstance(text, bytes) else f"error {int(status)}"


def load_driver() -> Driver:
    """Import the bindings, start the driver and check its version.

    Raises:
        BackendUnavailableError: the bindings are not installed; there is no driver; it is too old.
    """
    try:
        from cuda.bindings import driver as api
    except ImportError as error:
        raise missing_extra("cuda-bindings", "sample on a CUDA device", "cuda") from error
    return start_driver(Driver(api))


def start_driver(driver: Driver) -> Driver:
    """Initialise a driver and check its version; see :func:`load_driver`."""
    driver.call("cuInit", 0, purpose="start the NVIDIA driver")
    version = driver.call("cuDriverGetVersion")
    if version < MINIMUM_DRIVER:
        raise BackendUnavailableError(
            f"this NVIDIA driver supports CUDA {_dotted(version)}; "
            f"{_dotted(MINIMUM_DRIVER)} is needed. {_UPDATE}"
        )
    return driver


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
