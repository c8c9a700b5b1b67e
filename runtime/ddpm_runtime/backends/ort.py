"""ONNX Runtime on the CPU: buffers bound once, no copies, no allocation per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..bundle import Bundle, StepCache
from ..errors import (
    BackendError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    missing_extra,
)
from .base import (
    CachedBinding,
    NetworkBinding,
    NetworkShape,
    allocate_buffers,
    allocate_cached_buffers,
    no_step_cache,
)
from .processors import usable_processors

__all__ = ["OrtBackend", "open_ort"]

Tensors = dict[str, tuple[str, list[int]]]


def open_ort(bundle: Bundle, *, threads: int | None = None) -> OrtBackend:
    """Load a bundle's network into ONNX Runtime's CPU provider.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        threads: threads inside an operator; None means the processors this process may use.

    Raises:
        BackendUnavailableError: onnxruntime is not installed.
        NetworkMismatchError: inputs or outputs are not those of the manifest.
        BackendError: ONNX Runtime refuses the network.
        ConfigurationError: threads < 1.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "run an engine on the CPU", "cpu") from error
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads must be ≥ 1; got {threads}.")
    onnxruntime.set_default_logger_severity(3)
    return OrtBackend(onnxruntime, bundle, threads or usable_processors())


class OrtBackend:
    """A network in ONNX Runtime; make it with :func:`open_ort`."""

    name = "onnxruntime"

    def __init__(self, onnxruntime: Any, bundle: Bundle, threads: int) -> None:
        self.shape = NetworkShape.from_bundle(bundle)
        self.description = (
            f"ONNX Runtime {onnxruntime.__version__}, CPU, {threads} thread(s), "
            f"{bundle.manifest.network.precision}"
        )
        self._onnxruntime, self._threads = onnxruntime, threads
        self._bundle: Bundle | None = bundle
        self._parts: tuple[Any, Any] | None = None
        self._session = self._load(bundle.network_bytes, _tensors(self.shape))

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows.

        Raises:
            LifecycleError: the backend is closed.
        """
        self._open()
        return allocate_buffers(self.shape, capacity, self._runs(self._session))

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Make buffers for up to ``capacity`` network rows with step caching.

        Raises:
            LifecycleError: the backend is closed.
            ConfigurationError: the bundle has no step caching.
            BackendError, NetworkMismatchError: see :func:`open_ort`.
        """
        bundle = self._open()
        step_cache = bundle.manifest.network.step_cache
        if bundle.cached is None or not isinstance(step_cache, StepCache):
            raise no_step_cache(f"the bundle {bundle.manifest.name!r}")
        if self._parts is None:
            inputs, outputs = _tensors(self.shape)
            deep: Tensors = {"deep": ("tensor(float)", list(step_cache.deep))}
            self._parts = (
                self._load(bundle.cached.whole_bytes, (inputs, outputs | deep), alone=False),
                self._load(bundle.cached.shallow_bytes, (inputs | deep, outputs), alone=False),
            )
        whole, shallow = (self._runs(part) for part in self._parts)
        return allocate_cached_buffers(self.shape, step_cache.deep, capacity, whole, shallow)

    def close(self) -> None:
        """Release the network. Idempotent."""
        self._bundle = self._session = self._parts = None

    def _open(self) -> Bundle:
        if self._bundle is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        return self._bundle

    def _load(
        self, content: bytes, expected: tuple[Tensors, Tensors], *, alone: bool = True
    ) -> Any:
        """A session that has exactly the inputs and outputs that are expected.

        Args:
            content: the network.
            expected: inputs and outputs.
            alone: whether it runs again and again; two that take turns must not wait actively for
                work after a run, or each slows the other's threads.
        """
        library, bundle = self._onnxruntime, self._open()
        options = library.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.force_spinning_stop", str(int(not alone)))
        try:
            session = library.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises many unrelated types
            remedy = "Export the checkpoint again with ddpm-export."
            if bundle.manifest.network.precision == "bf16":
                remedy = (
                    "It computes no bfloat16 on the processor: use device='cuda', or the fp32 "
                    "bundle with backend='openvino', precision='bf16' (pip install "
                    "'ddpm-engine[openvino]')."
                )
            raise BackendError(
                f"ONNX Runtime {library.__version__} cannot load the network: {error}. {remedy}"
            ) from error
        _check_signature(session, *expected)
        return session

    def _runs(self, session: Any) -> Callable[[Any, int], None]:
        """Evaluate the first rows of a binding; what is bound once stays bound."""
        bound: dict[int, Any] = {}

        def run(binding: NetworkBinding | CachedBinding, rows: int) -> None:
            self._open()
            if rows not in bound:
                bound[rows] = _bind(session, binding, rows)
            try:
                session.run_with_iobinding(bound[rows])
            except Exception as error:  # ONNX Runtime raises many unrelated types
                raise BackendError(
                    f"ONNX Runtime failed on {rows} network rows: {error}"
                ) from error

        return run


def _bind(session: Any, binding: NetworkBinding | CachedBinding, rows: int) -> Any:
    """Bind the first ``rows`` rows of the buffers, by address."""
    io_binding = session.io_binding()
    for arguments, bind in (
        (session.get_inputs(), io_binding.bind_input),
        (session.get_outputs(), io_binding.bind_output),
    ):
        for argument in arguments:
            array = getattr(binding, argument.name)[:rows]
            bind(argument.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    return io_binding


def _tensors(shape: NetworkShape) -> tuple[Tensors, Tensors]:
    """Inputs and outputs that the manifest promises: type and shape without the batch."""
    inputs: Tensors = {
        "sample": ("tensor(float)", list(shape.image)),
        "timestep": ("tensor(float)", []),
    }
    if shape.num_classes:
        inputs["label"] = ("tensor(int64)", [])
    prediction = [shape.prediction_channels, *shape.image[1:]]
    return inputs, {"prediction": ("tensor(float)", prediction)}


def _check_signature(session: Any, inputs: Tensors, outputs: Tensors) -> None:
    """Compare the graph's inputs and outputs with what the manifest promises."""
    # a dimension that is not a number is dynamic; only the batch may be
    found = {i.name: (i.type, list(i.shape[1:])) for i in session.get_inputs()}
    if found != inputs:
        raise NetworkMismatchError(
            f"the manifest describes inputs {inputs}; the network has {found}. "
            "Export the checkpoint again with ddpm-export."
        )
    produced = {o.name: (o.type, list(o.shape[1:])) for o in session.get_outputs()}
    if produced != outputs:
        raise NetworkMismatchError(
            f"the manifest describes outputs {outputs}; the network has {produced}. "
            "Export the checkpoint again with ddpm-export."
        )
