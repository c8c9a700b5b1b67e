"""Plans ahead of time: ``ddpm-export --tensorrt``.

A plan for this machine needs no export: the backend builds it and keeps it in the plan cache. What
is written here is a file to carry to another machine of the same kind. There it is somebody else's
native code, so it is loaded only with --trust-plan. TensorRT-RTX builds by compute capability and
needs no GPU (--sm 89); TensorRT builds for the GPU it runs on. Must not import torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ddpm_runtime.bundle import Bundle
from ddpm_runtime.cuda import open_device
from ddpm_runtime.plans import (
    Gpu,
    PlanCache,
    PlanSpec,
    TensorRT,
    buckets_for,
    load_library,
    plan_from_cache,
)
from ddpm_runtime.plans.sealed import write_sealed

__all__ = ["default_plan_path", "plan_from_bundle"]


def plan_from_bundle(
    bundle: Bundle,
    path: str | os.PathLike[str],
    *,
    library: TensorRT | str | None = None,
    sms: Sequence[int] = (),
    capacity: int = 64,
    buckets: Sequence[int] | None = None,
    cache: PlanCache | None = None,
    notice: Callable[[str], None] = lambda _message: None,
) -> Path:
    """Write a plan file for a bundle's network.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        path: the file to write; replaced in one step if it is there.
        library: None means TensorRT-RTX when ``sms`` are given, else TensorRT.
        sms: compute capabilities to build for, times ten; empty means the GPU of this machine.
        capacity: most network rows at once. Guidance doubles the rows of a batch.
        buckets: batch sizes; None means 1, 2, 4, … up to the capacity.
        cache: None means this user's; the plan is taken from there, or built and kept there.
        notice: told why a plan is built.

    Returns:
        The path.

    Raises:
        BackendUnavailableError: the library is not installed; no GPU and no ``sms``.
        ConfigurationError: compute capabilities that the library cannot build for.
        PlanBuildError: it refuses the network.
        OSError: the path cannot be written.
    """
    if library is None or isinstance(library, str):
        library = load_library(library or ("tensorrt_rtx" if sms else "tensorrt"))
    cache = cache or PlanCache()
    gpu = None
    if not sms:
        with open_device() as device:
            gpu = Gpu.of(device)
    spec = PlanSpec(
        buckets=tuple(sorted({*buckets})) if buckets else buckets_for(capacity),
        precision=bundle.manifest.network.precision,
        sms=tuple(sorted({*sms})),
    )
    name = bundle.manifest.name
    plan = plan_from_cache(
        bundle.network_bytes, spec, library, gpu, cache, label=name, notice=notice
    )
    destination = Path(path)
    write_sealed(
        destination, plan.payload, kind="plan", label=name, key=plan.key, secret=cache.secret
    )
    return destination


def default_plan_path(engine: str | os.PathLike[str], sms: Sequence[int] = ()) -> Path:
    """``NAME.engine`` → ``NAME.sm86-sm89.plan`` beside it; ``NAME.plan`` for this machine's GPU."""
    path = Path(engine)
    targets = "-".join(f"sm{sm}" for sm in sorted({*sms}))
    stem = path.name.removesuffix(".engine")
    return path.with_name(f"{stem}.{targets}.plan" if targets else f"{stem}.plan")
