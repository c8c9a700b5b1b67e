"""What can go wrong on a CUDA device, beside the exceptions everybody shares.

BackendError
├── OutOfDeviceMemoryError   the device has not the memory that was asked for
└── GraphError               a CUDA graph could not be captured or instantiated
"""

from __future__ import annotations

from ..errors import BackendError

__all__ = ["GraphError", "OutOfDeviceMemoryError"]


class OutOfDeviceMemoryError(BackendError):
    """The device has not the memory that was asked for."""


class GraphError(BackendError):
    """A CUDA graph could not be captured or instantiated; plain launches still work."""
