"""From a network to a plan: ``plan_from_onnx``, for ``tensorrt`` 10.x, 11.x and ``tensorrt_rtx``.

    ONNX bytes ─▶ strongly typed network ─▶ one profile a batch size ─▶ plan

Each profile has its smallest, best and largest batch equal: kernels are chosen for exactly that
size, and a CUDA graph is captured at one size anyhow. Networks are always strongly typed, so the
types in the ONNX graph are the types that run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError, PlanBuildError
from .library import TensorRT
from .progress import ProgressLine, monitor_for
from .spec import PlanSpec

__all__ = ["BuiltPlan", "check_targets", "plan_from_onnx"]


@dataclass(frozen=True, kw_only=True, eq=False)
class BuiltPlan:
    """What a build gave.

    Args:
        payload: the plan.
        timing_cache: what the builder measured, to build faster next time; empty if nothing.
        layers: layers of the network before fusion.
        seconds: how long it took.
    """

    payload: bytes
    timing_cache: bytes
    layers: int
    seconds: float


def plan_from_onnx(
    library: TensorRT,
    onnx_bytes: bytes,
    spec: PlanSpec,
    *,
    timing_cache: bytes = b"",
    progress: ProgressLine | None = None,
) -> BuiltPlan:
    """Build a plan.

    Args:
        library: what builds it.
        onnx_bytes: the network of a bundle, already checked: the parser is native code.
        spec: batch sizes, targets, settings.
        timing_cache: of an earlier build with this library on this GPU, ours; empty for none.
        progress: shown while building; None means a line on stderr.

    Raises:
        ConfigurationError: compute capabilities that this library cannot build for.
        PlanBuildError: the library refuses the network or fails to build it; says why.
    """
    begun = time.monotonic()
    check_targets(library, spec)
    trt = library.module
    library.complaints.clear()
    builder = _made(library, "a builder", lambda: trt.Builder(library.logger))
    network = builder.create_network(_network_flags(library))
    parser = trt.OnnxParser(network, library.logger)
    if not parser.parse(onnx_bytes):
        raise PlanBuildError(
            f"{library.title} cannot read the network: {_parser_errors(parser)}. Export the "
            "checkpoint again with ddpm-export, or use --backend onnxruntime."
        )
    config = builder.create_builder_config()
    _configure(library, config, spec)
    _add_profiles(library, builder, network, config, spec)
    if not library.is_rtx:  # RTX measures nothing: it builds without a GPU
        _set_timing_cache(config, timing_cache)
    monitor = monitor_for(trt, progress or ProgressLine(sys.stderr))
    config.progress_monitor = monitor
    plan = _made(library, "a plan", lambda: builder.build_serialized_network(network, config))
    return BuiltPlan(
        payload=bytes(memoryview(plan)),
        timing_cache=b"" if library.is_rtx else _serialized(config.get_timing_cache()),
        layers=network.num_layers,
        seconds=time.monotonic() - begun,
    )


def check_targets(library: TensorRT, spec: PlanSpec) -> None:
    """Refuse compute capabilities that a library cannot build for.

    Raises:
        ConfigurationError: the message has those it can.
    """
    if library.is_rtx:
        possible = library.capabilities
        if not spec.sms:
            raise ConfigurationError(
                "TensorRT-RTX builds by compute capability; name at least one. Possible --sm: "
                f"{', '.join(map(str, possible))}."
            )
        for sm in spec.sms:
            if sm not in possible:
                raise ConfigurationError(
                    f"{library.title} cannot build for compute capability {sm // 10}.{sm % 10}; "
                    f"possible --sm: {', '.join(map(str, possible))}. On other GPUs use TensorRT "
                    "(pip install 'ddpm-engine[tensorrt]') or --backend onnxruntime."
                )
        if spec.precision == "bf16" and spec.sms[0] < 80:
            raise ConfigurationError(
                f"compute capability {spec.sms[0] // 10}.{spec.sms[0] % 10} has no bfloat16; "
                "export with --precision fp16 for it."
            )
    elif spec.sms:
        raise ConfigurationError(
            "TensorRT builds for the GPU it runs on; leave --sm out and build on that machine, or "
            "build ahead of time with TensorRT-RTX (pip install 'ddpm-engine[rtx]')."
        )


def _network_flags(library: TensorRT) -> int:
    """Strong typing: asked for in TensorRT 10, always on in 11 and in RTX."""
    if library.is_rtx or int(library.version.split(".")[0]) >= 11:
        return 0
    return 1 << int(library.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _configure(library: TensorRT, config: Any, spec: PlanSpec) -> None:
    trt = library.module
    config.max_aux_streams = 0  # one stream, so that one capture holds all of it
    flags = trt.BuilderFlag
    if not spec.tf32:
        config.clear_flag(flags.TF32)
    if spec.lane_independence and len(spec.buckets) == 1:  # refused with several profiles
        config.set_flag(flags.DISTRIBUTIVE_INDEPENDENCE)
    if hasattr(flags, "REQUIRE_USER_ALLOCATION"):  # RTX: nothing allocated while running
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    if spec.sms:
        config.num_compute_capabilities = len(spec.sms)
        for index, sm in enumerate(spec.sms):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)


def _add_profiles(
    library: TensorRT, builder: Any, network: Any, config: Any, spec: PlanSpec
) -> None:
    """One profile a bucket, in order, so profile i is bucket i."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    for one in inputs:
        shape = tuple(one.shape)
        if shape[:1] != (-1,) or -1 in shape[1:]:
            raise PlanBuildError(
                f"the network's input {one.name!r} has shape {shape}; its first dimension, and "
                "only that, must be dynamic. Export the checkpoint again with ddpm-export."
            )
    for bucket in spec.buckets:
        profile = builder.create_optimization_profile()
        for one in inputs:
            shape = (bucket, *tuple(one.shape)[1:])
            profile.set_shape(one.name, shape, shape, shape)
        if config.add_optimization_profile(profile) < 0:
            raise PlanBuildError(
                f"{library.title} refuses batch size {bucket}: {library.last_words()}."
            )


def _made(library: TensorRT, what: str, make: Callable[[], Any]) -> Any:
    """Call a factory that answers None, or raises, when it fails."""
    try:
        made = make()
    except (RuntimeError, TypeError) as error:
        library.complaints.append(str(error))
        made = None
    if made is None:
        raise PlanBuildError(
            f"{library.title} cannot make {what}: {library.last_words().rstrip('. ')}. Without a "
            "GPU, or with one it does not support, use --backend onnxruntime."
        )
    return made


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    return "; ".join(f"{one.desc()} (node {one.node_name()!r})" for one in errors[:3])


def _set_timing_cache(config: Any, timing_cache: bytes) -> None:
    """Use an earlier cache; a mismatch costs time only: refuse the cache, not the build."""
    measured = config.create_timing_cache(timing_cache)
    if measured is None or not config.set_timing_cache(measured, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _serialized(cache: Any) -> bytes:
    """The bytes of a timing cache; none where the library keeps none."""
    if cache is None:
        return b""
    memory = cache.serialize()
    return b"" if memory is None else bytes(memoryview(memory))
