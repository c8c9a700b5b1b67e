"""Which backends the processor has, and how one is chosen; CUDA devices: ``cuda.runner``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..bundle import Bundle
from ..errors import ConfigurationError, choose
from .base import Backend, NetworkBinding, NetworkShape
from .calibration import fastest, is_installed
from .function import FunctionBackend
from .ort import open_ort
from .ov import open_openvino

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Backend",
    "FunctionBackend",
    "NetworkBinding",
    "NetworkShape",
    "open_backend",
]

PRECISIONS = ("auto", "fp32", "fp16", "bf16")


def _open_ort(bundle: Bundle, *, threads: int | None, precision: str) -> Backend:
    own = bundle.manifest.network.precision
    if precision not in ("auto", own):
        raise ConfigurationError(
            f"precision={precision!r} was asked of ONNX Runtime, which computes what the graph "
            f"says; this bundle is {own}. Use precision='auto', or backend='openvino' for bf16 "
            "(pip install 'ddpm-engine[openvino]')."
        )
    return open_ort(bundle, threads=threads)


BACKENDS: dict[str, Callable[..., Backend]] = {
    "onnxruntime": _open_ort,
    "openvino": open_openvino,
}


def open_backend(
    bundle: Bundle,
    *,
    backend: str = "auto",
    threads: int | None = None,
    precision: str = "auto",
) -> tuple[Backend, str]:
    """Open a bundle's network on the processor.

    Args:
        bundle: the bundle.
        backend: a key of :data:`BACKENDS`; "auto" for the first of them that is installed, so that
            a machine always draws the same bits; "fastest" for the one that measures fastest.
        threads: see ``open_ort``.
        precision: one of :data:`PRECISIONS`; "auto" is what the bundle was exported in, always.

    Returns:
        The backend, and the reason it was chosen.

    Raises:
        ConfigurationError: no such precision, or not with this backend, bundle or processor.
        BackendUnavailableError, BackendError, NetworkMismatchError: see the backend.
    """
    choose("precision", precision, PRECISIONS)
    choose("backend", backend, ("auto", "fastest", *BACKENDS))
    options: dict[str, Any] = {"threads": threads, "precision": precision}
    if backend not in ("auto", "fastest"):
        return BACKENDS[backend](bundle, **options), "asked for"
    own = bundle.manifest.network.precision
    if precision not in ("auto", own):
        return open_openvino(bundle, **options), f"automatic: the CPU backend for {precision}"
    if own != "fp32":
        return _open_ort(bundle, **options), f"automatic: the CPU backend for {own} bundles"
    if backend == "fastest":
        return fastest(bundle, BACKENDS, options)
    for name, open_it in BACKENDS.items():
        if is_installed(name):
            return open_it(bundle, **options), "automatic: the first that is installed"
    return _open_ort(bundle, **options), "automatic"
