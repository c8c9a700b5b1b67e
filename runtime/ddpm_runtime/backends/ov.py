"""OpenVINO on the CPU: static shapes, bfloat16 on request, compiled networks kept on disk.

OpenVINO's own Python package rather than its provider for ONNX Runtime: the provider refuses
processors that Intel did not make, cannot be given a network from memory, and is no faster.

Rows are evaluated in chunks of 1, 2, 4, … rows (see :mod:`.chunks`), each a network compiled for
that shape. OpenVINO may choose other kernels for another shape, which would give an image other
bits in another batch. So every shape is compared bit by bit with two rows at a time, on noise,
before it is used; one that differs is never used. The verdict is kept with the compiled network.
"""

from __future__ import annotations

import io
import os
import platform
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import (
    BackendError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    missing_extra,
)
from .base import NetworkBinding, NetworkShape
from .chunks import Chunk, chunks
from .processors import usable_processors
from .user_cache import UserCache

__all__ = ["OpenVinoBackend", "open_openvino"]

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_ROLES = ("sample", "timestep", "label", "prediction")
_REFERENCE_ROWS = 2
_LARGEST_CHUNK = 16
_FORMAT = 1  # of what is cached; count up when compilation below changes

Arrays = dict[str, NDArray[Any]]

# A fork copies these objects and not the threads that their destructors wait for. So in a child
# they are never destroyed, not even by its garbage collector.
_alive: WeakSet[Any] = WeakSet()
_kept_in_child: list[Any] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _kept_in_child.extend(_alive))


def open_openvino(
    bundle: Bundle,
    *,
    threads: int | None = None,
    precision: str = "auto",
    cache: UserCache | None = None,
) -> OpenVinoBackend:
    """Open a bundle's network in OpenVINO's CPU plugin. Shapes are compiled when first needed.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        threads: threads inside an operator; None means the processors this process may use.
        precision: "bf16" computes in bfloat16, whose images differ; "auto", "fp32" in float32.
        cache: compiled networks; None means the user's.

    Raises:
        BackendUnavailableError: openvino is not installed.
        ConfigurationError: threads < 1; a precision that the bundle or the processor has not.
        NetworkMismatchError: inputs or outputs are not those of the manifest.
        BackendError: OpenVINO refuses the network.
    """
    computed = _check_precision(bundle, precision)
    if threads is not None and threads < 1:
        raise ConfigurationError(f"threads must be ≥ 1; got {threads}.")
    try:
        import openvino
    except ImportError as error:
        raise missing_extra("openvino", "run an engine with OpenVINO", "openvino") from error
    core = openvino.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if computed == "bf16" and "BF16" not in capabilities:
        raise ConfigurationError(
            "precision='bf16' was asked; this processor computes no bfloat16 "
            f"(it has {', '.join(sorted(capabilities))}). Use precision='fp32'."
        )
    compiler = _Compiler(
        core, openvino, bundle, computed, threads or usable_processors(), cache or UserCache()
    )
    compiler.check()
    return OpenVinoBackend(compiler, NetworkShape.from_bundle(bundle))


class OpenVinoBackend:
    """A network in OpenVINO; make it with :func:`open_openvino`."""

    name = "openvino"

    def __init__(self, compiler: _Compiler, shape: NetworkShape) -> None:
        self._compiler: _Compiler | None = compiler
        self.shape = shape
        self.description = compiler.description

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows; compile the shapes they need.

        Raises:
            LifecycleError: the backend is closed.
            NetworkMismatchError: inputs or outputs are not those of the manifest.
            BackendError: OpenVINO refuses the network.
        """
        compiler = self._open_compiler()
        padded = -(-capacity // _LARGEST_CHUNK) * _LARGEST_CHUNK
        arrays = _buffers(self.shape, padded)
        plans: dict[int, list[Any]] = {}
        requests: dict[Chunk, Any] = {}

        def plan(rows: int) -> list[Any]:
            covering = chunks(rows, smallest=compiler.smallest(rows), largest=_LARGEST_CHUNK)
            for chunk in covering:
                if chunk not in requests:
                    requests[chunk] = compiler.request(chunk, arrays)
            return [requests[chunk] for chunk in covering]

        def run(rows: int) -> None:
            self._open_compiler()
            if rows not in plans:
                plans[rows] = plan(rows)
            try:
                for request in plans[rows]:
                    request.infer()
            except Exception as error:  # OpenVINO raises RuntimeError for everything
                raise BackendError(f"OpenVINO failed on {rows} network rows: {error}") from error

        plans[capacity] = plan(capacity)
        compiler.forget_model()
        return NetworkBinding(
            sample=arrays["sample"][:capacity],
            timestep=arrays["timestep"][:capacity],
            label=arrays["label"][:capacity],
            prediction=arrays["prediction"][:capacity],
            run=run,
        )

    def close(self) -> None:
        """Release the network. Idempotent."""
        self._compiler = None

    def _open_compiler(self) -> _Compiler:
        if self._compiler is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        return self._compiler


class _Compiler:
    """Compiled networks by number of rows, from memory, from the cache, or made."""

    def __init__(
        self,
        core: Any,
        openvino: Any,
        bundle: Bundle,
        precision: str,
        threads: int,
        cache: UserCache,
    ) -> None:
        self._core, self._openvino, self._bundle = core, openvino, bundle
        _alive.add(core)
        self._shape = NetworkShape.from_bundle(bundle)
        self._cache = cache
        self._lock = threading.Lock()
        self._model: Any = None
        self._compiled: dict[int, Any] = {}
        self._exact: dict[int, bool] = {_REFERENCE_ROWS: True}
        self._properties = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # processes that pin threads to the same processors wait for one another
            "ENABLE_CPU_PINNING": False,
        }
        name = str(core.get_property("CPU", "FULL_DEVICE_NAME")).strip()
        version = openvino.__version__.split("-")[0]
        self._key = (
            _FORMAT,
            bundle.manifest.files["network.onnx"].sha256,
            openvino.__version__,
            name,
            platform.machine(),
            tuple(sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))),
            tuple(self._properties.items()),
        )
        self.description = f"OpenVINO {version}, CPU ({name}), {threads} thread(s), {precision}"

    def check(self) -> None:
        """Read the network, unless it was compiled before: refuse it now rather than later."""
        with self._lock:
            if self._cache.load("openvino-checked", *self._key) is None:
                self._read_model()
                self._cache.store("openvino-checked", *self._key, content=b"yes")

    def smallest(self, rows: int) -> int:
        """The smallest chunk for this many rows: 1, or 2 where 1 is not needed or not exact."""
        return 1 if rows % _REFERENCE_ROWS and self._is_exact(1) else _REFERENCE_ROWS

    def request(self, chunk: Chunk, arrays: Arrays) -> Any:
        """An inference request over these rows of the buffers, which must outlive it."""
        if not self._is_exact(chunk.size):
            return _Sequence(
                [
                    self.request(Chunk(start=start, size=_REFERENCE_ROWS), arrays)
                    for start in range(chunk.start, chunk.start + chunk.size, _REFERENCE_ROWS)
                ]
            )
        compiled = self._network(chunk.size)
        request = compiled.create_infer_request()
        _alive.add(request)
        rows = slice(chunk.start, chunk.start + chunk.size)
        for port in (*compiled.inputs, *compiled.outputs):
            view = arrays[_role(port)][rows]
            request.set_tensor(port, self._openvino.Tensor(view, shared_memory=True))
        return request

    def _is_exact(self, rows: int) -> bool:
        """Whether rows evaluated this many at a time have the bits of two at a time."""
        with self._lock:
            if rows not in self._exact:
                known = self._cache.load("openvino-exact", *self._key, rows)
                self._exact[rows] = known == b"yes" if known else self._compare(rows)
                if not known:
                    verdict = b"yes" if self._exact[rows] else b"no"
                    self._cache.store("openvino-exact", *self._key, rows, content=verdict)
            return self._exact[rows]

    def _compare(self, rows: int) -> bool:
        probes = _probes(self._shape, max(rows, 2 * _REFERENCE_ROWS))
        expected = self._evaluate(_REFERENCE_ROWS, probes)
        return bool(np.array_equal(expected, self._evaluate(rows, probes), equal_nan=True))

    def _evaluate(self, rows: int, probes: Arrays) -> NDArray[Any]:
        request = self._compile(rows).create_infer_request()
        _alive.add(request)
        names = [_role(port) for port in self._compile(rows).inputs]
        parts = []
        for start in range(0, len(probes["sample"]), rows):
            given = {name: probes[name][start : start + rows] for name in names}
            parts.append(request.infer(given)[0].copy())
        return np.concatenate(parts)

    def _network(self, rows: int) -> Any:
        with self._lock:
            return self._compile(rows)

    def _compile(self, rows: int) -> Any:
        """The network for this many rows; the caller holds the lock."""
        if rows not in self._compiled:
            self._compiled[rows] = self._cached(rows) or self._made(rows)
            _alive.add(self._compiled[rows])
        return self._compiled[rows]

    def _cached(self, rows: int) -> Any:
        content = self._cache.load("openvino-network", *self._key, rows)
        if content is None:
            return None
        try:
            return self._core.import_model(io.BytesIO(content), "CPU", self._properties)
        except Exception:  # another build of the same version: compile again
            return None

    def _made(self, rows: int) -> Any:
        model = self._read_model()
        try:
            model.reshape({port: [rows, *_tail(port)] for port in model.inputs})
            compiled = self._core.compile_model(model, "CPU", self._properties)
            exported = io.BytesIO()
            compiled.export_model(exported)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise self._refusal(error) from error
        self._cache.store("openvino-network", *self._key, rows, content=exported.getvalue())
        return compiled

    def _read_model(self) -> Any:
        if self._model is None:
            try:
                model = self._core.read_model(self._bundle.network_bytes, b"")
            except Exception as error:  # OpenVINO raises RuntimeError for everything
                raise self._refusal(error) from error
            _check_signature(model, self._shape)
            self._model = model
        return self._model

    def forget_model(self) -> None:
        """Release the network as it was read; compiled networks have their own weights."""
        with self._lock:
            self._model = None

    def _refusal(self, error: Exception) -> BackendError:
        last_line = (str(error).strip().splitlines() or [""])[-1]  # the first names source code
        return BackendError(
            f"{self.description} cannot load the network: {last_line}. "
            "Use backend='onnxruntime', or export the checkpoint again with ddpm-export."
        )


class _Sequence:
    """Several inference requests in one."""

    def __init__(self, requests: list[Any]) -> None:
        self._infers: list[Callable[[], Any]] = [request.infer for request in requests]

    def infer(self) -> None:
        """Run them in order."""
        for infer in self._infers:
            infer()


def _check_precision(bundle: Bundle, precision: str) -> str:
    """fp32 or bf16: what the network is computed in."""
    own = bundle.manifest.network.precision
    if own != "fp32":
        raise ConfigurationError(
            f"this bundle is {own}, which is written in its graph; OpenVINO is given fp32 bundles "
            "only. Use backend='onnxruntime' with precision='auto', or export an fp32 bundle."
        )
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigurationError(
            f"precision={precision!r} was asked; on the processor there are fp32 and bf16. Use one "
            f"of them, or write a bundle with ddpm-export --precision {precision} for a GPU."
        )
    return "fp32" if precision == "auto" else precision


def _buffers(shape: NetworkShape, rows: int) -> Arrays:
    """Zeros that OpenVINO reads and writes in place."""
    channels, height, width = shape.image
    return {
        "sample": np.zeros((rows, channels, height, width), np.float32),
        "timestep": np.zeros(rows, np.float32),
        "label": np.zeros(rows, np.int64),
        "prediction": np.zeros((rows, shape.prediction_channels, height, width), np.float32),
    }


def _probes(shape: NetworkShape, rows: int) -> Arrays:
    """Noise at every level, every class in turn."""
    random = np.random.default_rng(0)
    return {
        "sample": random.standard_normal((rows, *shape.image), np.float32),
        "timestep": np.linspace(0, 999, rows, dtype=np.float32),
        "label": np.arange(rows, dtype=np.int64) % (shape.num_classes + 1),
    }


def _tail(port: Any) -> list[int]:
    """Dimensions after the batch; −1 for one that is dynamic."""
    return [-1 if size.is_dynamic else size.get_length() for size in list(port.partial_shape)[1:]]


def _role(port: Any) -> str:
    """What a tensor is: it may have several names, after layers were fused."""
    names = port.names
    return next((role for role in _ROLES if role in names), str(sorted(names)))


def _check_signature(model: Any, shape: NetworkShape) -> None:
    """Compare the graph's inputs and outputs with what the manifest promises."""
    image = list(shape.image)
    expected = {"sample": ("f32", image), "timestep": ("f32", [])}
    if shape.num_classes:
        expected["label"] = ("i64", [])
    expected["prediction"] = ("f32", [shape.prediction_channels, *image[1:]])
    found = {
        _role(port): (port.element_type.get_type_name(), _tail(port))
        for port in (*model.inputs, *model.outputs)
    }
    if found != expected:
        raise NetworkMismatchError(
            f"the manifest describes tensors {expected}; the network has {found}. "
            "Export the checkpoint again with ddpm-export."
        )
