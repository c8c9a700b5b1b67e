"""The plan for a network on this machine: from a file that was named, or from the cache.

    named file ─▶ sealed by us? ─▶ same library, GPU, network? ─▶ whole? ─┐
    cache ─▶ found by its whole key, else built ──────────────────────────┴▶ deserialise

Everything is decided from the header, before a byte of the plan is read, let alone given to the
library: deserialising a plan is running it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import PlanMismatchError
from .build import plan_from_onnx
from .cache import PlanCache
from .library import TensorRT
from .progress import ProgressLine
from .sealed import Sealed, read_sealed
from .spec import ANY, Gpu, PlanKey, PlanSpec

__all__ = ["LoadedPlan", "plan_from_cache", "plan_from_file"]

Notice = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedPlan:
    """A plan that may be deserialised here.

    Args:
        payload: its bytes, the very ones that were checked.
        key: what it was built for.
        reason: where it came from.
    """

    payload: bytes
    key: PlanKey
    reason: str

    @property
    def buckets(self) -> tuple[int, ...]:
        """Batch sizes, in the order of the plan's profiles."""
        return tuple(int(bucket) for bucket in self.key.buckets.split(","))


def plan_from_file(
    path: str | os.PathLike[str],
    onnx_bytes: bytes,
    library: TensorRT,
    gpu: Gpu,
    cache: PlanCache,
    *,
    trust_plan: bool = False,
) -> LoadedPlan:
    """Read a plan that the user named.

    Args:
        path: a file that ``ddpm-export --tensorrt`` or the cache wrote.
        onnx_bytes: the bundle's network, which the plan must have been built from.
        library: what would load it.
        gpu: where it would run.
        cache: knows this user's secret.
        trust_plan: load it although somebody else built it.

    Raises:
        UntrustedPlanError: somebody else built it, and ``trust_plan`` is off.
        PlanMismatchError: it is for another library, version, GPU, CUDA or network.
        DamagedPlanError: it is truncated, altered, or no plan file.
        OSError: it cannot be read.
    """

    def check(header: Sealed) -> None:
        header.require_ours(trust_plan=trust_plan)
        misfits = header.key.misfits(library=library.name, version=library.version, gpu=gpu)
        if header.kind != "plan":
            misfits.append(f"it holds {header.kind!r}, not a plan")
        sha256 = hashlib.sha256(onnx_bytes).hexdigest()
        if header.key.network_sha256 != sha256:
            misfits.append(
                f"the network is {sha256[:8]}… in the bundle, "
                f"{header.key.network_sha256[:8]}… in the plan"
            )
        if misfits:
            raise PlanMismatchError(
                f"{str(path)!r} cannot be loaded: {'; '.join(misfits)}. Leave the plan out, and "
                "one is built for this machine."
            )

    header, payload = read_sealed(Path(path), cache.secret, check)
    origin = "this user's" if header.ours else "somebody else's, trusted on request"
    return LoadedPlan(payload=payload, key=header.key, reason=f"{origin} plan {str(path)!r}")


def plan_from_cache(
    onnx_bytes: bytes,
    spec: PlanSpec,
    library: TensorRT,
    gpu: Gpu | None,
    cache: PlanCache,
    *,
    label: str,
    notice: Notice = lambda _message: None,
    progress: ProgressLine | None = None,
) -> LoadedPlan:
    """Find a plan in the cache, or build it and keep it there.

    Args:
        onnx_bytes: the bundle's network.
        spec: what to build. TensorRT-RTX without ``sms`` builds for the GPU's compute capability.
        library: what builds it.
        gpu: where it will run; None only with ``sms``.
        cache: where plans are kept.
        label: the network's name, for people.
        notice: told why a plan is built, and whom we wait for.
        progress: shown while building.

    Raises:
        PlanBuildError: the library refuses the network.
        ConfigurationError: a compute capability it cannot build for; no GPU and no ``sms``.
    """
    if library.is_rtx and not spec.sms and gpu is not None:
        spec = dataclasses.replace(spec, sms=(gpu.sm,))
    key = PlanKey.of(onnx_bytes, spec, library=library.name, version=library.version, gpu=gpu)

    def build() -> bytes:
        timings = dataclasses.replace(
            key, network_sha256=ANY, precision=ANY, buckets=ANY, builder=ANY
        )
        built = plan_from_onnx(
            library,
            onnx_bytes,
            spec,
            timing_cache=cache.get(timings, "timing") or b"",
            progress=progress,
        )
        if built.timing_cache:
            cache.put(timings, "timing", built.timing_cache, label=label, notice=notice)
        notice(f"built in {built.seconds:.1f} s: {len(built.payload) / 1e6:.1f} MB")
        return built.payload

    found = cache.get_or_build(key, build, label=label, notice=notice)
    return LoadedPlan(payload=found.payload, key=key, reason=found.reason)
