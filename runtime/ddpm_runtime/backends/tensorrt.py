"""TensorRT on a CUDA device: ``tensorrt`` 10.x and 11.x, and ``tensorrt_rtx``, behind one backend.

    open_tensorrt ─▶ bind(buffers): the plan for so many rows, one block of workspace
        ─▶ prepare(stream, rows): one context for the batch size, its addresses, one run
        ─▶ enqueue(stream, rows): nothing but execute_async_v3, so it may be captured ─▶ close

All memory a context uses is given to it: workspace by us, inputs and outputs by the executor. The
contexts of a binding share one workspace, which is sound because they run on one stream.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle
from ..errors import BackendError, ConfigurationError, LifecycleError
from ..plans import (
    Gpu,
    LoadedPlan,
    PlanCache,
    PlanEngine,
    PlanError,
    PlanSpec,
    TensorRT,
    buckets_for,
    library_failure,
    load_library,
    plan_from_cache,
    plan_from_file,
)
from .base import NetworkShape

if TYPE_CHECKING:
    from ..cuda.base import DeviceBuffers
    from ..cuda.device import Device, DeviceMemory

__all__ = ["TensorRTBackend", "TensorRTBinding", "open_tensorrt"]

Notice = Callable[[str], None]


def open_tensorrt(
    bundle: Bundle,
    device: Device,
    *,
    library: TensorRT | str = "tensorrt",
    buckets: Sequence[int] | None = None,
    plan: str | os.PathLike[str] | None = None,
    trust_plan: bool = False,
    optimization_level: int | None = None,
    cache: PlanCache | None = None,
    notice: Notice = lambda _message: None,
) -> TensorRTBackend:
    """Get ready to run a bundle's network as a TensorRT plan.

    Nothing is built or loaded before :meth:`TensorRTBackend.bind` says for how many rows, except a
    plan that was named, which is checked at once.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        device: where it runs; it stays the caller's.
        library: "tensorrt", "tensorrt_rtx", or one already loaded.
        buckets: batch sizes a plan holds; None means 1, 2, 4, … up to the rows that are bound.
        plan: a plan file to use instead of the cache.
        trust_plan: use it although somebody else built it: it is native code.
        optimization_level: 0 to 5, how long a build searches; None leaves it to the library.
        cache: where plans are kept; None means this user's.
        notice: told why a plan is built, and whom we wait for.

    Raises:
        BackendUnavailableError: the library is not installed.
        UntrustedPlanError, PlanMismatchError, DamagedPlanError: see ``plans.plan_from_file``.
        ConfigurationError: an unknown library, or a cache that is not this user's alone.
    """
    loaded = load_library(library) if isinstance(library, str) else library
    plans = _Plans(
        bundle=bundle,
        library=loaded,
        gpu=Gpu.of(device),
        cache=cache or PlanCache(),
        buckets=None if buckets is None else tuple(sorted({*buckets})),
        optimization_level=optimization_level,
        notice=notice,
    )
    named = None
    if plan is not None:
        named = plan_from_file(
            plan, bundle.network_bytes, loaded, plans.gpu, plans.cache, trust_plan=trust_plan
        )
    return TensorRTBackend(plans, device, named)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Plans:
    """How this backend comes by a plan; see :func:`open_tensorrt`."""

    bundle: Bundle
    library: TensorRT
    gpu: Gpu
    cache: PlanCache
    buckets: tuple[int, ...] | None
    optimization_level: int | None
    notice: Notice

    def for_rows(self, rows: int) -> LoadedPlan:
        """A plan whose largest batch size, or one of whose batch sizes, is ``rows``."""
        asked = self.buckets or ()
        spec = PlanSpec(
            buckets=asked if rows in asked else buckets_for(rows),
            precision=self.bundle.manifest.network.precision,
            optimization_level=self.optimization_level,
        )
        return plan_from_cache(
            self.bundle.network_bytes,
            spec,
            self.library,
            self.gpu,
            self.cache,
            label=self.bundle.manifest.name,
            notice=self.notice,
        )


class TensorRTBackend:
    """A network as TensorRT plans on one device; make it with :func:`open_tensorrt`."""

    name = "tensorrt"

    def __init__(self, plans: _Plans, device: Device, named: LoadedPlan | None) -> None:
        self.shape = NetworkShape.from_bundle(plans.bundle)
        self._plans = plans
        self._device = device
        self._named = named
        self._engines: list[PlanEngine] = []
        self._closed = False

    @property
    def description(self) -> str:
        """Library, version, GPU, precision, and where the plans came from."""
        origins = "; ".join(engine.reason for engine in self._engines) or "no plan loaded yet"
        precision = self._plans.bundle.manifest.network.precision
        return f"{self._plans.library.title}, {self._plans.gpu.name}, {precision} (plan: {origins})"

    def bind(self, buffers: DeviceBuffers) -> TensorRTBinding:
        """Load, or build, a plan for these buffers and take their addresses.

        Raises:
            LifecycleError: the backend is closed.
            PlanError: no plan can be had, or the one that was named has no such batch size.
            NetworkMismatchError: the plan's tensors are not those of the manifest.
            OutOfDeviceMemoryError: the workspace does not fit.
        """
        if self._closed:
            raise LifecycleError("this backend is closed; load the engine again.")
        self._device.make_current()
        return TensorRTBinding(self._engine_for(buffers.rows), self._device, buffers)

    def close(self) -> None:
        """Release the plans; bindings must be closed before. Idempotent."""
        self._closed = True
        self._engines.clear()

    def _engine_for(self, rows: int) -> PlanEngine:
        for engine in self._engines:
            if rows in engine.buckets:
                return engine
        if self._named is not None and rows not in self._named.buckets:
            raise PlanError(
                f"the plan holds batch sizes {', '.join(map(str, self._named.buckets))}; {rows} "
                "rows were asked for. Choose one of them (guidance doubles the rows of a batch), "
                "or leave the plan out and one is built."
            )
        plan = self._named or self._plans.for_rows(rows)
        engine = PlanEngine(
            plan,
            self._plans.library,
            self._plans.gpu,
            self._plans.cache,
            tensors=_tensors(self.shape),
            label=self._plans.bundle.manifest.name,
        )
        self._engines.append(engine)
        return engine


class TensorRTBinding:
    """A plan bound to buffers; see :meth:`TensorRTBackend.bind`."""

    def __init__(self, engine: PlanEngine, device: Device, buffers: DeviceBuffers) -> None:
        self._engine: PlanEngine | None = engine
        self._device = device
        self._buffers = buffers
        self._contexts: dict[int, Any] = {}
        self._capture_safe = True
        usable = [i for i, bucket in enumerate(engine.buckets) if bucket <= buffers.rows]
        self._workspace_bytes = engine.workspace_bytes(usable)
        self._workspace: DeviceMemory = device.allocate(max(self._workspace_bytes, 1))

    @property
    def capture_safe(self) -> bool:
        """Whether ``enqueue`` may be captured; RTX says so of each context once it has run."""
        return self._capture_safe

    def prepare(self, stream: int, rows: int) -> None:
        """Make the context for so many rows, give it its memory, and run it once.

        Raises:
            BackendError: the library refuses.
            ConfigurationError: the default stream, which cannot be captured.
            LifecycleError: the binding is closed.
        """
        engine = self._open()
        if not stream:
            raise ConfigurationError("TensorRT needs a stream of its own, not the default one.")
        bucket = self._bucket(engine, rows)
        if bucket in self._contexts:
            return
        context = engine.new_context()
        profile = engine.buckets.index(bucket)
        self._ask(
            context.set_optimization_profile_async(profile, stream), f"take batch size {bucket}"
        )
        context.set_device_memory(self._workspace.address, self._workspace_bytes)
        for name, shape in engine.tensors.items():
            if name != "prediction":
                self._ask(context.set_input_shape(name, (bucket, *shape)), f"take input {name}")
            self._ask(
                context.set_tensor_address(name, getattr(self._buffers, name)),
                f"take the address of {name}",
            )
        missing = list(context.infer_shapes())
        if missing:
            raise BackendError(
                f"{engine.library.title} cannot tell the shapes of {', '.join(missing)}. Remove "
                "the plan and it is built again."
            )
        self._ask(context.execute_async_v3(stream), f"run batch size {bucket}")
        self._device.driver.call("cuStreamSynchronize", stream, purpose="run the plan once")
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream):
            self._capture_safe = False
        self._contexts[bucket] = context
        engine.keep_kernels()

    def enqueue(self, stream: int, rows: int) -> None:
        """Evaluate rows [0, rows) in stream order; rows up to the batch size are evaluated too.

        Raises:
            BackendError: the library failed.
            LifecycleError: closed, or not prepared for so many rows.
        """
        context = self._contexts.get(self._bucket(self._open(), rows))
        if context is None:
            raise LifecycleError(f"call prepare(stream, {rows}) before enqueue(stream, {rows}).")
        if not context.execute_async_v3(stream):
            raise library_failure(self._open().library, f"run {rows} rows")

    def close(self) -> None:
        """Release contexts and workspace. Idempotent."""
        if self._engine is None:
            return
        self._engine = None
        self._contexts.clear()  # before the memory they were given
        self._workspace.close()

    def _open(self) -> PlanEngine:
        if self._engine is None:
            raise LifecycleError("this binding is closed; bind the buffers again.")
        return self._engine

    def _bucket(self, engine: PlanEngine, rows: int) -> int:
        """The smallest batch size that holds so many rows and fits the buffers."""
        for bucket in engine.buckets:
            if 1 <= rows <= bucket <= self._buffers.rows:
                return bucket
        raise BackendError(
            f"{rows} rows were asked for; these buffers hold 1 to {self._buffers.rows}."
        )

    def _ask(self, granted: bool, what: str) -> None:
        if not granted:
            raise library_failure(self._open().library, what)


def _tensors(shape: NetworkShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network without its batch dimension."""
    channels, height, width = shape.image
    shapes: dict[str, tuple[int, ...]] = {"sample": (channels, height, width), "timestep": ()}
    if shape.num_classes:
        shapes["label"] = ()
    shapes["prediction"] = (shape.prediction_channels, height, width)
    return shapes
