"""Plans ahead of time: ``ddpm-export --tensorrt``.

A plan for this machine needs no export: the backend builds it and keeps it in the plan cache. What
is written here is a file to carry to another machine of the same kind. There it is somebody else's
native code, so it is loaded only with --trust-plan. TensorRT-RTX builds by compute capability and
needs no GPU (--sm 89); TensorRT builds for the GPU it runs on. Must not import torch or onnx.

    prepare_plan ─▶ everything that can be refused ─▶ PreparedPlan ─▶ minutes of export ─▶ write
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_runtime.bundle import Bundle
from ddpm_runtime.cuda import open_device
from ddpm_runtime.errors import BackendUnavailableError, ConfigurationError
from ddpm_runtime.plans import (
    DamagedPlanError,
    Gpu,
    PlanCache,
    PlanSpec,
    TensorRT,
    buckets_for,
    load_library,
    plan_from_cache,
)
from ddpm_runtime.plans.build import check_targets
from ddpm_runtime.plans.sealed import read_header, write_sealed

__all__ = [
    "CAPACITY",
    "PreparedPlan",
    "check_plan_path",
    "default_plan_path",
    "plan_from_bundle",
    "prepare_plan",
]

CAPACITY = 64
"""Most network rows of a plan that is not told."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedPlan:
    """A plan that can be built, as far as can be told without its network.

    Args:
        library: what builds it.
        spec: batch sizes, precision, compute capabilities.
        gpu: the GPU of this machine; None when built for compute capabilities.
        cache: the plan is taken from there, or built and kept there.
    """

    library: TensorRT
    spec: PlanSpec
    gpu: Gpu | None
    cache: PlanCache

    def write(
        self,
        bundle: Bundle,
        path: str | os.PathLike[str],
        *,
        notice: Callable[[str], None] = lambda _message: None,
    ) -> Path:
        """Build the plan of a bundle's network and write it; a file that is there is replaced.

        Args:
            bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
            path: the file to write, in one step.
            notice: told why a plan is built.

        Returns:
            The path.

        Raises:
            PlanBuildError: the library refuses the network.
            OSError: the path cannot be written.
        """
        name, destination = bundle.manifest.name, Path(path)
        spec = dataclasses.replace(self.spec, precision=bundle.manifest.network.precision)
        plan = plan_from_cache(
            bundle.network_bytes, spec, self.library, self.gpu, self.cache, label=name,
            notice=notice,
        )  # fmt: skip
        write_sealed(
            destination,
            plan.payload,
            kind="plan",
            label=name,
            key=plan.key,
            secret=self.cache.secret,
        )
        return destination


def prepare_plan(
    precision: str,
    *,
    library: TensorRT | str | None = None,
    sms: Sequence[int] = (),
    capacity: int = CAPACITY,
    buckets: Sequence[int] | None = None,
    cache: PlanCache | None = None,
) -> PreparedPlan:
    """Find what a plan will be built with and for, and refuse what cannot be built.

    Args:
        precision: of the network that the plan will be built from.
        library: None means TensorRT-RTX when ``sms`` are given, else TensorRT.
        sms: compute capabilities to build for, times ten; empty means the GPU of this machine.
        capacity: most network rows at once. Guidance doubles the rows of a batch.
        buckets: batch sizes; None means 1, 2, 4, … up to the capacity.
        cache: None means this user's.

    Raises:
        BackendUnavailableError: no GPU and no ``sms``; the library is not installed.
        ConfigurationError: compute capabilities that the library cannot build for, or not in this
            precision; an impossible capacity.
        OSError: the plan cache cannot be made.
    """
    spec = PlanSpec(
        buckets=tuple(sorted({*buckets})) if buckets else buckets_for(capacity),
        precision=precision,
        sms=tuple(sorted({*sms})),
    )
    gpu = None if sms else _gpu_of_this_machine()
    if library is None or isinstance(library, str):
        library = load_library(library or ("tensorrt_rtx" if sms else "tensorrt"))
    if library.is_rtx and gpu is not None:
        spec = dataclasses.replace(spec, sms=(gpu.sm,))
    check_targets(library, spec)
    return PreparedPlan(library=library, spec=spec, gpu=gpu, cache=cache or PlanCache())


def plan_from_bundle(
    bundle: Bundle,
    path: str | os.PathLike[str],
    *,
    library: TensorRT | str | None = None,
    sms: Sequence[int] = (),
    capacity: int = CAPACITY,
    buckets: Sequence[int] | None = None,
    cache: PlanCache | None = None,
    notice: Callable[[str], None] = lambda _message: None,
) -> Path:
    """:func:`prepare_plan` and :meth:`PreparedPlan.write` in one; their arguments and errors."""
    prepared = prepare_plan(
        bundle.manifest.network.precision,
        library=library,
        sms=sms,
        capacity=capacity,
        buckets=buckets,
        cache=cache,
    )
    return prepared.write(bundle, path, notice=notice)


def default_plan_path(engine: str | os.PathLike[str], sms: Sequence[int] = ()) -> Path:
    """``NAME.engine`` → ``NAME.sm86-sm89.plan`` beside it; ``NAME.plan`` for this machine's GPU."""
    path = Path(engine)
    targets = "-".join(f"sm{sm}" for sm in sorted({*sms}))
    stem = path.name.removesuffix(".engine")
    return path.with_name(f"{stem}.{targets}.plan" if targets else f"{stem}.plan")


def check_plan_path(path: Path, *, force: bool) -> None:
    """Refuse early what must not be replaced: with ``force`` a plan, and nothing else.

    Raises:
        ConfigurationError: something is there, and ``force`` is off or it is no plan file.
        OSError: its directory is not writable.
    """
    if not os.access(path.parent, os.W_OK):
        raise OSError(
            f"cannot write {str(path)!r}: {str(path.parent)!r} is no directory to write in."
        )
    if not os.path.lexists(path):
        return
    if not force:
        raise ConfigurationError(f"{str(path)!r} exists; give --force to replace it, or move it.")
    try:
        read_header(path, b"")
    except DamagedPlanError as error:
        raise ConfigurationError(
            f"{str(path)!r} exists and is not a plan, so --force does not replace it. Move it."
        ) from error


def _gpu_of_this_machine() -> Gpu:
    try:
        with open_device() as device:
            return Gpu.of(device)
    except BackendUnavailableError as error:
        raise BackendUnavailableError(
            "a plan is built for a GPU, and none can be used here. Name the compute capability it "
            "is for (--sm 89), which TensorRT-RTX builds for without a GPU (pip install "
            f"'ddpm-engine[rtx]'), or make the GPU usable: {error}"
        ) from error
