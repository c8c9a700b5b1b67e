"""A network on a CUDA device, and the device-resident lanes to run it in.

    open_cuda(bundle, Opening(device="cuda"), 0) ─▶ CudaRunner.lanes(64) ─▶ CudaLanes

The numbers of lanes are powers of two, so that one plan and few graphs serve every request. With
``Opening.lanes`` there is one number, and every evaluation has the same shape: then an image has
the same bits in every company, which libraries on GPUs do not promise from one shape to another.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..backends.base import NetworkShape, no_step_cache
from ..bundle import Bundle
from ..errors import BackendError, BackendUnavailableError, ConfigurationError
from .base import DeviceBackend
from .device import Device, open_device
from .executor import CudaLanes, lanes_that_fit

if TYPE_CHECKING:
    from ..runner import Opening

__all__ = ["CudaRunner", "open_cuda", "open_network"]

_log = logging.getLogger("ddpm_runtime")

_LOOKS = 40  # at a program that is watched: as many as a film has frames


class CudaRunner:
    """A network on one device; make it with :func:`open_cuda`, which owns nothing afterwards.

    Args:
        device: the device; closed with the runner.
        backend: the network on it; closed with the runner.
        reason: why these were chosen.
        lanes: the one number of lanes; None means any power of two.
        graph_level: "auto", "L0", "L1" or "L2".
    """

    def __init__(
        self,
        device: Device,
        backend: DeviceBackend,
        *,
        reason: str,
        lanes: int | None = None,
        graph_level: str = "auto",
    ) -> None:
        self.device = device
        self.backend = backend
        self._reason = reason
        self._lanes = lanes
        self._graph_level = graph_level

    @property
    def description(self) -> str:
        """Library, version, GPU, precision, and the reason."""
        always = f", always {self._lanes} lanes" if self._lanes else ""
        return f"{self.backend.description}{always} ({self._reason})"

    def capacity_for(self, images: int) -> int:
        """The next power of two, or the one number there is."""
        return self._lanes or 1 << (images - 1).bit_length()

    def rows_at_once(self, rows: int, *, watched: bool) -> int:
        """All of them, unless somebody watches: each look waits for the device."""
        return -(-rows // _LOOKS) if watched else rows

    def require_step_cache(self, bundle: Bundle) -> None:
        """Step caching is not done on a CUDA device.

        Raises:
            ConfigurationError: always.
        """
        raise no_step_cache(self.backend.description)

    def lanes(self, capacity: int) -> CudaLanes:
        """Make lanes; half as many if the device does not hold them and any number will do.

        Raises:
            OutOfDeviceMemoryError: they do not fit.
            BackendError: the network refuses, or a graph level that was asked cannot be had.
        """
        if self._lanes is None:
            return lanes_that_fit(self._make, capacity)
        return self._make(capacity)

    def close(self) -> None:
        """Release the network, then the device. Idempotent."""
        self.backend.close()
        self.device.close()

    def _make(self, capacity: int) -> CudaLanes:
        buckets = (self.backend.shape.rows_for(capacity),) if self._lanes else None
        return CudaLanes(
            self.device, self.backend, capacity, graph_level=self._graph_level, buckets=buckets
        )


def open_cuda(bundle: Bundle, opening: Opening, ordinal: int) -> CudaRunner:
    """Open a device and get a bundle's network ready on it.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        opening: what was asked; "auto" takes the first backend that this machine has.
        ordinal: the device's number.

    Raises:
        ConfigurationError: something that only the processor has was asked.
        BackendUnavailableError: no bindings, driver, device, or backend; the message has the line
            to install it.
        PlanError: a plan that was named cannot be used.
    """
    _check(bundle, opening)
    device = open_device(ordinal)
    try:
        backend, reason = _open_backend(bundle, device, opening)
    except BaseException:
        with suppress(BackendError):
            device.close()
        raise
    return CudaRunner(
        device, backend, reason=reason, lanes=opening.lanes, graph_level=opening.graph_level
    )


def _check(bundle: Bundle, opening: Opening) -> None:
    own = bundle.manifest.network.precision
    if opening.precision not in ("auto", own):
        raise ConfigurationError(
            f"precision={opening.precision!r} was asked; on a CUDA device the precision is in the "
            f"network, and this bundle is {own}. Write another bundle with ddpm-export "
            f"--precision {opening.precision}."
        )
    if opening.threads is not None:
        raise ConfigurationError(
            f"threads={opening.threads} is for the processor; leave it out on a CUDA device."
        )
    if opening.backend == "onnxruntime" and (opening.plan is not None or opening.trust_plan):
        raise ConfigurationError(
            "plan and trust_plan are TensorRT's; use backend='tensorrt', or leave them out."
        )
    if opening.trust_plan and opening.plan is None:
        raise ConfigurationError("trust_plan needs the plan to trust; give plan.")


def _open_backend(bundle: Bundle, device: Device, opening: Opening) -> tuple[DeviceBackend, str]:
    """The backend that was asked for, or the first that can be had here."""
    options: dict[str, Any] = {"plan": opening.plan, "trust_plan": opening.trust_plan}
    if opening.lanes is not None:
        options["buckets"] = (NetworkShape.from_bundle(bundle).rows_for(opening.lanes),)
    if opening.backend != "auto":
        return open_network(bundle, device, opening.backend, **options), "asked for"
    refusals = []
    for library in ("tensorrt", "tensorrt_rtx"):
        if importlib.util.find_spec(library) is None:
            refusals.append(f"{library} is not installed")
            continue
        try:
            return open_network(bundle, device, library, **options), _because(refusals)
        except BackendUnavailableError as error:
            refusals.append(str(error))
    if opening.plan is not None:
        raise BackendUnavailableError(
            f"no TensorRT for the plan: {'; '.join(refusals)}. Install one: pip install "
            "'ddpm-engine[tensorrt]'"
        )
    try:
        return open_network(bundle, device, "onnxruntime"), _because(refusals)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(f"{'; '.join(refusals)}; {error}") from error


def _because(refusals: list[str]) -> str:
    return "; ".join(["automatic: the first that this machine has", *refusals])


def open_network(
    bundle: Bundle,
    device: Device,
    backend: str,
    *,
    buckets: Sequence[int] | None = None,
    plan: str | os.PathLike[str] | None = None,
    trust_plan: bool = False,
    notice: Callable[[str], None] = _log.warning,
) -> DeviceBackend:
    """Get a network ready on a device by the name of a backend.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        device: where; it stays the caller's.
        backend: "tensorrt", "tensorrt_rtx" or "onnxruntime".
        buckets: batch sizes of a TensorRT plan; None means all powers of two that are needed.
        plan: a plan file to use instead of the cache.
        trust_plan: use it although somebody else built it.
        notice: told why a plan is built.

    Raises:
        BackendUnavailableError: the library is not installed, or does not support this GPU.
        BackendError: it refuses the network, or a plan that was named.
    """
    if backend == "onnxruntime":
        from ..backends.ort_cuda import open_ort_cuda

        return open_ort_cuda(bundle, device)
    from ..backends.tensorrt import open_tensorrt
    from ..plans import load_library

    library = load_library(backend)
    if library.is_rtx and device.sm not in library.capabilities:
        supported = ", ".join(f"{sm / 10:.1f}" for sm in library.capabilities)
        raise BackendUnavailableError(
            f"{library.title} supports compute capabilities {supported}; {device.name} has "
            f"{device.sm / 10:.1f}. Use backend='tensorrt' or 'onnxruntime' on it."
        )
    return open_tensorrt(
        bundle,
        device,
        library=library,
        buckets=buckets,
        plan=plan,
        trust_plan=trust_plan,
        notice=notice,
    )
