"""OpenVINO's compiled networks by number of rows: from memory, from the cache, or made.

A shape is compiled once and kept on disk. Before one is used its answers are compared, bit by bit,
with those of two rows; before bfloat16 is used, its answers with those in float32.
"""

from __future__ import annotations

import io
import platform
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import (
    BackendError,
    ConfigurationError,
    NetworkMismatchError,
)
from .base import NetworkShape
from .chunks import Chunk
from .forks import kept_in_children
from .user_cache import UserCache

__all__ = ["LARGEST_CHUNK", "REFERENCE_ROWS", "Compiler"]

_HINTS = {"fp32": "f32", "bf16": "bf16"}
_ROLES = ("sample", "timestep", "label", "prediction")
REFERENCE_ROWS = 2
LARGEST_CHUNK = 16
_LARGEST_ERROR = 0.2  # of an answer in bfloat16, relative to the answer in float32
_FORMAT = 1  # of what is cached; count up when compilation below changes

Arrays = dict[str, NDArray[Any]]


class Compiler:
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
        self._core, self._openvino, self._bundle = kept_in_children(core), openvino, bundle
        self._shape = NetworkShape.from_bundle(bundle)
        self.cache, self.threads = cache, threads
        self._lock = threading.Lock()
        self._model: Any = None
        self._compiled: dict[int, Any] = {}
        self._exact: dict[int, bool] = {REFERENCE_ROWS: True}
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
            if self.cache.load("openvino-checked", *self._key) is None:
                self._read_model()
                self.cache.store("openvino-checked", *self._key, content=b"yes")

    def require_near_float32(self, single: Compiler) -> None:
        """Compare a few evaluations with those in float32, once for each network and machine.

        Raises:
            ConfigurationError: they differ too much.
        """
        known = self.cache.load("openvino-error", *self._key)
        if known is None:
            probes = _probes(self._shape, 4 * REFERENCE_ROWS)
            expected, found = (
                one.evaluate(REFERENCE_ROWS, probes).reshape(4 * REFERENCE_ROWS, -1)
                for one in (single, self)
            )
            with np.errstate(all="ignore"):
                errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
            known = repr(float(errors.max())).encode()
            self.cache.store("openvino-error", *self._key, content=known)
        error = float(known)
        self.description += f", {error:.1%} from fp32"
        if not error <= _LARGEST_ERROR:
            raise ConfigurationError(
                f"precision='bf16' was asked; this network's answers are then {error:.1%} from "
                f"those in float32, more than {_LARGEST_ERROR:.0%}. Use precision='fp32'; which "
                "layer loses it is said by ddpm-export --precision bf16."
            )

    def smallest(self, rows: int) -> int:
        """The smallest chunk for this many rows: 1, or 2 where 1 is not needed or not exact."""
        return 1 if rows % REFERENCE_ROWS and self._is_exact(1) else REFERENCE_ROWS

    def request(self, chunk: Chunk, arrays: Arrays) -> Any:
        """An inference request over these rows of the buffers, which must outlive it."""
        if not self._is_exact(chunk.size):
            return _Sequence(
                [
                    self.request(Chunk(start=start, size=REFERENCE_ROWS), arrays)
                    for start in range(chunk.start, chunk.start + chunk.size, REFERENCE_ROWS)
                ]
            )
        compiled = self._network(chunk.size)
        request = kept_in_children(compiled.create_infer_request())
        rows = slice(chunk.start, chunk.start + chunk.size)
        for port in (*compiled.inputs, *compiled.outputs):
            view = arrays[_role(port)][rows]
            request.set_tensor(port, self._openvino.Tensor(view, shared_memory=True))
        return request

    def _is_exact(self, rows: int) -> bool:
        """Whether rows evaluated this many at a time have the bits of two at a time."""
        with self._lock:
            if rows not in self._exact:
                known = self.cache.load("openvino-exact", *self._key, rows)
                self._exact[rows] = known == b"yes" if known else self._compare(rows)
                if not known:
                    verdict = b"yes" if self._exact[rows] else b"no"
                    self.cache.store("openvino-exact", *self._key, rows, content=verdict)
            return self._exact[rows]

    def _compare(self, rows: int) -> bool:
        probes = _probes(self._shape, max(rows, 2 * REFERENCE_ROWS))
        expected = self.evaluate(REFERENCE_ROWS, probes)
        return bool(np.array_equal(expected, self.evaluate(rows, probes), equal_nan=True))

    def evaluate(self, rows: int, probes: Arrays) -> NDArray[Any]:
        """Answers to probes, ``rows`` at a time; the caller holds the lock, or shares nothing."""
        request = kept_in_children(self._compile(rows).create_infer_request())
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
            self._compiled[rows] = kept_in_children(self._cached(rows) or self._made(rows))
        return self._compiled[rows]

    def _cached(self, rows: int) -> Any:
        content = self.cache.load("openvino-network", *self._key, rows)
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
        self.cache.store("openvino-network", *self._key, rows, content=exported.getvalue())
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
