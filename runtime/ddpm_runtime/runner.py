"""A network made ready to run somewhere, and the lanes to run it in.

    open_runner(bundle, Opening(device="cuda")) ─▶ runner.lanes(64) ─▶ HostLanes or CudaLanes

An explicit choice never falls back. "auto" takes a CUDA device where one can be used, else the
processor, and says which and why.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backends import BACKENDS, PRECISIONS, Backend, open_backend
from .backends.base import no_step_cache
from .bundle import Bundle
from .errors import BackendUnavailableError, ConfigurationError, choose
from .lanes import HostLanes, Known
from .program import SamplerProgram

__all__ = [
    "BACKEND_CHOICES",
    "CUDA_BACKENDS",
    "GRAPH_LEVELS",
    "FinishedLane",
    "HostRunner",
    "Lanes",
    "Opening",
    "Runner",
    "open_runner",
]

GRAPH_LEVELS = ("auto", "L0", "L1", "L2")

CUDA_BACKENDS = ("tensorrt", "tensorrt_rtx", "onnxruntime")

BACKEND_CHOICES = tuple(dict.fromkeys(("auto", "fastest", *BACKENDS, *CUDA_BACKENDS)))


class FinishedLane(Protocol):
    """A lane that reached the end of its program, or failed on the way."""

    tag: Any
    failed_row: int | None

    @property
    def image(self) -> NDArray[np.float32]:
        """(C, H, W) float32, when ``advance`` was not asked for pixels."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, C) uint8, when it was."""


class Lanes(Protocol):
    """The loop; ``lanes.HostLanes`` documents and specifies it, ``cuda.CudaLanes`` is its twin."""

    capacity: int
    rows_done: int

    @property
    def active(self) -> int: ...  # noqa: D102

    @property
    def free(self) -> int: ...  # noqa: D102

    def start(  # noqa: D102
        self,
        program: SamplerProgram,
        *,
        seed: int,
        index: int,
        label: int | None = None,
        guidance_scale: float = 1.0,
        initial: NDArray[np.float32] | None = None,
        known: Known | None = None,
        tag: Any = None,
    ) -> None: ...

    def advance(self, rows: int = 1, *, pixels: bool = False) -> Any: ...  # noqa: D102

    def images(self) -> dict[Any, NDArray[np.float32]]: ...  # noqa: D102

    def cancel(self) -> int: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class Runner(Protocol):
    """A loaded network that lanes can be made for."""

    @property
    def description(self) -> str:
        """What runs the network, on what, and why that was chosen."""

    def capacity_for(self, images: int) -> int:
        """How many lanes to make for so many images in flight."""

    def rows_at_once(self, rows: int, *, watched: bool) -> int:
        """Rows of a program to do between looks, for a program of so many."""

    def require_step_cache(self, bundle: Bundle) -> None:
        """Refuse step caching where there is none.

        Raises:
            ConfigurationError: the bundle, or what runs it, has none.
        """

    def lanes(self, capacity: int) -> Lanes:
        """Make lanes.

        Raises:
            OutOfDeviceMemoryError: the device has no room for them.
            BackendError: the network refuses.
        """

    def close(self) -> None:
        """Release the network; lanes must be closed before. Idempotent."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Where and how to run a network; see :meth:`ddpm_runtime.Engine.load` for each."""

    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    precision: str = "auto"
    lanes: int | None = None
    graph_level: str = "auto"
    plan: str | os.PathLike[str] | None = None
    trust_plan: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class HostRunner:
    """A network on the processor.

    Args:
        backend: the loaded network.
        reason: why it was chosen.
        most: most lanes at once; None is no limit.
    """

    backend: Backend
    reason: str
    most: int | None = None

    @property
    def description(self) -> str:
        """Library, version, threads, precision, and the reason."""
        return f"{self.backend.description} ({self.reason})"

    def capacity_for(self, images: int) -> int:
        """As many as asked for: an empty lane costs nothing here."""
        return min(images, self.most or images)

    def rows_at_once(self, rows: int, *, watched: bool) -> int:
        """One: looking costs nothing here."""
        return 1

    def require_step_cache(self, bundle: Bundle) -> None:
        """Refuse step caching where there is none."""
        if bundle.cached is None:
            raise no_step_cache(f"the bundle {bundle.manifest.name!r}")
        if self.backend.name != "onnxruntime":
            raise no_step_cache(self.backend.description)

    def lanes(self, capacity: int) -> HostLanes:
        """Make lanes."""
        return HostLanes(self.backend, capacity)

    def close(self) -> None:
        """Release the network. Idempotent."""
        self.backend.close()


def open_runner(bundle: Bundle, opening: Opening) -> Runner:
    """Load a bundle's network where it is to run.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        opening: what was asked.

    Raises:
        ConfigurationError: an unknown word, or choices that exclude each other.
        BackendUnavailableError: no such device, or a library that is not installed.
        BackendError, NetworkMismatchError, PlanError: the network cannot be loaded there.
    """
    ordinal = _ordinal(opening.device)
    choose("backend", opening.backend, BACKEND_CHOICES)
    choose("precision", opening.precision, PRECISIONS)
    choose("graph level", opening.graph_level, GRAPH_LEVELS)
    if opening.lanes is not None and opening.lanes < 1:
        raise ConfigurationError(f"lanes must be ≥ 1; got {opening.lanes}.")
    _check_excluded(opening, ordinal)
    if ordinal is not None or _is_for_cuda(opening):
        return _open_cuda(bundle, opening, ordinal or 0)
    refusal = ""
    if opening.device == "auto" and not _is_for_host(bundle, opening):
        try:
            return _open_cuda(bundle, opening, 0)
        except BackendUnavailableError as error:
            refusal = _unless_plain(str(error))
    backend, reason = open_backend(
        bundle, backend=opening.backend, threads=opening.threads, precision=opening.precision
    )
    return HostRunner(backend=backend, reason=f"{reason}{refusal}", most=opening.lanes)


def _ordinal(device: str) -> int | None:
    """The number of a CUDA device that was asked for by name; None for another word."""
    words = re.fullmatch(r"cuda(?::(\d{1,3}))?", device)
    if words is not None:
        return int(words[1] or 0)
    if device not in ("auto", "cpu"):
        choose("device", device, ("auto", "cpu", "cuda", "cuda:1"))
    return None


def _check_excluded(opening: Opening, ordinal: int | None) -> None:
    """Refuse choices that exclude each other.

    Raises:
        ConfigurationError: the first pair of them.
    """
    on_host = opening.device == "cpu" or opening.backend in ("openvino", "fastest")
    for name, asked in _cuda_choices(opening).items():
        if on_host:
            where = "device" if opening.device == "cpu" else "backend"
            raise ConfigurationError(
                f"{name} is for CUDA devices, and {where}={getattr(opening, where)!r} was asked. "
                f"Leave out {name}={asked!r}, or use device='cuda'."
            )
    if ordinal is not None and opening.backend in ("openvino", "fastest"):
        raise ConfigurationError(
            f"backend={opening.backend!r} is for the processor, and device={opening.device!r} was "
            f"asked. There, use auto, {', '.join(CUDA_BACKENDS)}; ddpm-bench measures them."
        )


def _cuda_choices(opening: Opening) -> dict[str, Any]:
    """What was asked that only a CUDA device has."""
    choices = {
        "backend": opening.backend.startswith("tensorrt") and opening.backend,
        "graph_level": opening.graph_level != "auto" and opening.graph_level,
        "plan": opening.plan is not None and os.fspath(opening.plan),
        "trust_plan": opening.trust_plan,
    }
    return {name: asked for name, asked in choices.items() if asked}


def _is_for_cuda(opening: Opening) -> bool:
    return bool(_cuda_choices(opening))


def _is_for_host(bundle: Bundle, opening: Opening) -> bool:
    """Whether something was asked that only the processor has."""
    return (
        opening.backend in ("openvino", "fastest")
        or opening.threads is not None
        or opening.precision not in ("auto", bundle.manifest.network.precision)
        or os.environ.get("DDPM_DEVICE") == "cpu"
    )


def _open_cuda(bundle: Bundle, opening: Opening, ordinal: int) -> Runner:
    from .cuda.runner import open_cuda  # a machine without a GPU never pays for it

    return open_cuda(bundle, opening, ordinal)


def _unless_plain(refusal: str) -> str:
    """Why a GPU that somebody could expect to be used was not; nothing where none was set up."""
    cause = re.split(r"[:.;] ", refusal, maxsplit=1)[0]
    return "" if "is not installed" in cause else f"; no GPU: {cause}"
