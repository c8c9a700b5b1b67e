"""Which backends there are, and how one is chosen."""

from __future__ import annotations

from ..bundle import Bundle
from .base import Backend, NetworkBinding, NetworkShape
from .function import FunctionBackend
from .ort import open_ort

__all__ = [
    "BACKENDS",
    "DEVICES",
    "Backend",
    "FunctionBackend",
    "NetworkBinding",
    "NetworkShape",
    "open_backend",
]

DEVICES = ("auto", "cpu")

BACKENDS = {"onnxruntime": open_ort}


def open_backend(
    bundle: Bundle, *, device: str, backend: str, threads: int | None
) -> tuple[Backend, str]:
    """Open a bundle's network.

    Args:
        bundle: the bundle.
        device: one of :data:`DEVICES`.
        backend: a key of :data:`BACKENDS`, or "auto".
        threads: see ``open_ort``.

    Returns:
        The backend, and the reason it was chosen.

    Raises:
        BackendUnavailableError, BackendError, NetworkMismatchError: see the backend.
    """
    name = "onnxruntime" if backend == "auto" else backend
    reason = "asked for"
    if "auto" in (device, backend):
        reason = "automatic: the CPU backend this release has"
    return BACKENDS[name](bundle, threads=threads), reason
