"""ONNX Runtime on the CPU: buffers bound once, no copies, no allocation per step.

A network is loaded for the threads that share each operator, which is best for a few rows, and,
when first needed, for one thread, which takes some of many rows through it (:mod:`.side_by_side`).
ONNX Runtime computes a row alike in both, and in any number of rows; ``tests`` hold it to that.
"""

from __future__ import annotations

import threading
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
from .forks import kept_in_children
from .processors import usable_processors
from .side_by_side import Crew, Work, shares

__all__ = ["OrtBackend", "open_ort"]

Tensors = dict[str, tuple[str, list[int]]]


def open_ort(bundle: Bundle, *, threads: int | None = None) -> OrtBackend:
    """Load a bundle's network into ONNX Runtime's CPU provider.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        threads: how many work at once; None means the processors this process may use.

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
        self._precision = bundle.manifest.network.precision
        self._crew = Crew(threads)
        network = self._load(bundle.network_bytes, _tensors(self.shape))
        self._loaded: tuple[Bundle, _Network] | None = (bundle, network)
        self._parts: tuple[_Network, _Network] | None = None

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows.

        Raises:
            LifecycleError: the backend is closed.
        """
        _, network = self._open()
        return allocate_buffers(self.shape, capacity, self._runs(network))

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Make buffers for up to ``capacity`` network rows with step caching.

        Raises:
            LifecycleError: the backend is closed.
            ConfigurationError: the bundle has no step caching.
            BackendError, NetworkMismatchError: see :func:`open_ort`.
        """
        bundle, _ = self._open()
        step_cache = bundle.manifest.network.step_cache
        if bundle.cached is None or not isinstance(step_cache, StepCache):
            raise no_step_cache(f"the bundle {bundle.manifest.name!r}")
        if self._parts is None:
            inputs, outputs = _tensors(self.shape)
            deep: Tensors = {"deep": ("tensor(float)", list(step_cache.deep))}
            self._parts = (
                self._load(bundle.cached.whole_bytes, (inputs, outputs | deep)),
                self._load(bundle.cached.shallow_bytes, (inputs | deep, outputs)),
            )
        whole, shallow = (self._runs(part) for part in self._parts)
        return allocate_cached_buffers(self.shape, step_cache.deep, capacity, whole, shallow)

    def close(self) -> None:
        """Release the network. Idempotent."""
        self._crew.close()
        self._loaded = self._parts = None

    def _open(self) -> tuple[Bundle, _Network]:
        if self._loaded is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        return self._loaded

    def _load(self, content: bytes, expected: tuple[Tensors, Tensors]) -> _Network:
        """A network that has exactly the inputs and outputs that are expected."""
        network = _Network(lambda threads: self._session(content, threads), self._threads)
        _check_signature(network.session(self._threads), *expected)
        return network

    def _session(self, content: bytes, threads: int) -> Any:
        library = self._onnxruntime
        options = library.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        # sessions take turns; threads that wait actively after a run would slow the next one's
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return kept_in_children(
                library.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            )
        except Exception as error:  # ONNX Runtime raises many unrelated types
            remedy = "Export the checkpoint again with ddpm-export."
            if self._precision == "bf16":
                remedy = (
                    "It computes no bfloat16 on the processor: use device='cuda', or the fp32 "
                    "bundle with backend='openvino', precision='bf16' (pip install "
                    "'ddpm-engine[openvino]')."
                )
            raise BackendError(
                f"ONNX Runtime {library.__version__} cannot load the network: {error}. {remedy}"
            ) from error

    def _runs(self, network: _Network) -> Callable[[Any, int], None]:
        """Evaluate the first rows of a binding; what is bound once stays bound."""
        bound: dict[int, list[Work]] = {}

        def run(binding: NetworkBinding | CachedBinding, rows: int) -> None:
            self._open()
            if rows not in bound:
                bound[rows] = network.bind(binding, rows)
            try:
                self._crew.run(bound[rows])
            except Exception as error:  # ONNX Runtime raises many unrelated types
                raise BackendError(
                    f"ONNX Runtime failed on {rows} network rows: {error}"
                ) from error

        return run


class _Network:
    """One network, in a session for each number of threads inside an operator.

    Args:
        make: makes the session.
        threads: how many may work at once.
    """

    def __init__(self, make: Callable[[int], Any], threads: int) -> None:
        self._make, self._threads = make, threads
        self._lock = threading.Lock()
        self._sessions: dict[int, Any] = {}

    def session(self, threads: int) -> Any:
        """The session whose operators have this many threads."""
        with self._lock:
            if threads not in self._sessions:
                self._sessions[threads] = self._make(threads)
            return self._sessions[threads]

    def bind(self, binding: NetworkBinding | CachedBinding, rows: int) -> list[Work]:
        """What to do at once to evaluate the first rows of the buffers."""
        taken = shares(rows, self._threads)
        if taken is None:
            return [_bound(self.session(self._threads), binding, [slice(rows)])]
        return [_bound(self.session(1), binding, chunks) for chunks in taken]


def _bound(session: Any, binding: NetworkBinding | CachedBinding, chunks: list[slice]) -> Work:
    """Evaluate some rows of the buffers, a chunk after the other."""
    bindings = [_bind(session, binding, chunk) for chunk in chunks]

    def work() -> None:
        for io_binding in bindings:
            session.run_with_iobinding(io_binding)

    return work


def _bind(session: Any, binding: NetworkBinding | CachedBinding, rows: slice) -> Any:
    """Bind these rows of the buffers, by address."""
    io_binding = session.io_binding()
    for arguments, bind in (
        (session.get_inputs(), io_binding.bind_input),
        (session.get_outputs(), io_binding.bind_output),
    ):
        for argument in arguments:
            array = getattr(binding, argument.name)[rows]
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
