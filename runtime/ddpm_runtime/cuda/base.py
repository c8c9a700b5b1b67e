"""The seam to an inference library on a CUDA device: fixed device buffers in and out.

    binding = backend.bind(buffers)     the library takes these addresses, once
    binding.prepare(stream, rows)       what must happen before the first enqueue of so many rows
    binding.enqueue(stream, rows)       evaluates rows [0, rows) on the stream; returns at once
    binding.close(); backend.close()

The executor owns the buffers and the stream; the library owns weights and workspace. The same rule
as on the host: a backend sees tensors and timesteps, never schedules, samplers or seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..backends.base import NetworkShape

__all__ = ["DeviceBackend", "DeviceBinding", "DeviceBuffers"]


@dataclass(frozen=True, kw_only=True)
class DeviceBuffers:
    """Device addresses of ``rows`` network rows; they never move while a binding lives.

    Args:
        rows: network rows the buffers hold.
        sample: (rows, C, H, W) float32.
        timestep: (rows,) float32.
        label: (rows,) int64; 0 for an unconditional network.
        prediction: (rows, prediction_channels, H, W) float32, written by ``enqueue``.
    """

    rows: int
    sample: int
    timestep: int
    label: int
    prediction: int


class DeviceBinding(Protocol):
    """A network bound to buffers."""

    @property
    def capture_safe(self) -> bool:
        """Whether ``enqueue`` may be captured into a caller's CUDA graph.

        False for a library that runs a graph of its own (ONNX Runtime). ``prepare`` may turn it
        from True to False.
        """

    def prepare(self, stream: int, rows: int) -> None:
        """Get ready for ``enqueue`` with this many rows: profiles, workspace, a run to warm up.

        Called once before the first ``enqueue`` of so many rows, never during a capture; may
        synchronise. It may overwrite ``prediction``.

        Raises:
            BackendError: the library refuses this many rows.
        """

    def enqueue(self, stream: int, rows: int) -> None:
        """Evaluate rows [0, rows) in stream order. No allocation, no synchronisation.

        A row's answer must not depend on what the other rows hold.

        Raises:
            BackendError: the library failed.
        """

    def close(self) -> None:
        """Release what the binding holds. Idempotent."""


class DeviceBackend(Protocol):
    """A network loaded on a CUDA device."""

    @property
    def name(self) -> str:
        """Short name, as ``--backend`` takes it."""

    @property
    def description(self) -> str:
        """What runs and on what, for people: library, version, device, precision."""

    @property
    def shape(self) -> NetworkShape:
        """The network's tensors."""

    def bind(self, buffers: DeviceBuffers) -> DeviceBinding:
        """Take the addresses of the network's inputs and outputs.

        Raises:
            LifecycleError: the backend is closed.
            OutOfDeviceMemoryError: the library's workspace does not fit.
        """

    def close(self) -> None:
        """Release the network. Idempotent."""
