"""ONNX Runtime on a CUDA device: fixed addresses, our stream, its own CUDA graph, never the CPU.

    open_ort_cuda ─▶ bind(buffers) ─▶ prepare(stream, rows): a session whose batch is frozen at so
    many rows, bound by address, run until its graph is captured ─▶ enqueue: one replay ─▶ close

A frozen batch leaves no shape to compute at run time. ONNX Runtime cannot be captured inside a
caller's graph, so it captures its own (``capture_safe`` is False), and the executor's kernels are
launched beside it on the same stream. It answers a CUDA provider that cannot be loaded by running
on the CPU without a word: that is switched off in three places and checked.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..bundle import Bundle
from ..errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    missing_extra,
)
from .base import NetworkShape

if TYPE_CHECKING:
    from ..cuda.base import DeviceBuffers
    from ..cuda.device import Device

__all__ = ["OrtCudaBackend", "OrtCudaBinding", "open_ort_cuda"]

_PROVIDER = "CUDAExecutionProvider"
_RUNS_TO_CAPTURE = 3  # an ordinary one, the one that is captured, a first replay


def open_ort_cuda(
    bundle: Bundle,
    device: Device,
    *,
    own_graph: bool = True,
    tf32: bool = False,
    prefer_nhwc: bool | None = None,
) -> OrtCudaBackend:
    """Get ready to run a bundle's network in ONNX Runtime's CUDA provider.

    Args:
        bundle: what :func:`~ddpm_runtime.bundle.read_bundle` returned.
        device: where it runs; it stays the caller's.
        own_graph: let ONNX Runtime capture a CUDA graph of the network and replay it.
        tf32: let float32 layers round their inputs to ten bits. Off: then "fp32" means it.
        prefer_nhwc: let convolutions run channels-last, which tensor cores want; None means yes,
            except for bfloat16, which has no such kernels in ONNX Runtime 1.31.

    Raises:
        BackendUnavailableError: onnxruntime is not installed, or is a build without CUDA.
        NetworkMismatchError: an input's batch dimension is not dynamic.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "run an engine on a GPU", "gpu") from error
    if _PROVIDER not in onnxruntime.get_available_providers():
        raise BackendUnavailableError(
            f"onnxruntime {onnxruntime.__version__} here is a build without CUDA. Install the "
            "other: pip uninstall -y onnxruntime && pip install 'ddpm-engine[gpu]'"
        )
    onnxruntime.set_default_logger_severity(3)
    if hasattr(onnxruntime, "preload_dlls"):  # finds CUDA and cuDNN in pip's nvidia packages
        with contextlib.redirect_stdout(sys.stderr):
            onnxruntime.preload_dlls()
    if prefer_nhwc is None:
        prefer_nhwc = bundle.manifest.network.precision != "bf16"
    options = {
        "device_id": str(device.ordinal),
        "use_tf32": str(int(tf32)),
        "prefer_nhwc": str(int(prefer_nhwc)),
        "cudnn_conv_use_max_workspace": "1",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(own_graph)),
    }
    return OrtCudaBackend(onnxruntime, bundle, device, options)


class OrtCudaBackend:
    """A network in ONNX Runtime on one device; make it with :func:`open_ort_cuda`."""

    name = "onnxruntime"

    def __init__(
        self, onnxruntime: Any, bundle: Bundle, device: Device, options: dict[str, str]
    ) -> None:
        self.shape = NetworkShape.from_bundle(bundle)
        self._onnxruntime = onnxruntime
        self._device = device
        self._options = options
        self.ordinal = int(options["device_id"])
        self._precision = bundle.manifest.network.precision
        self._network: bytes | None = bundle.network_bytes
        self._batch_names = tuple(sorted({*_batch_names(bundle.network_bytes)}))

    @property
    def description(self) -> str:
        """Library, version, GPU, precision, and whether it replays a graph."""
        graph = ", its own CUDA graph" if self._options["enable_cuda_graph"] == "1" else ""
        return (
            f"ONNX Runtime {self._onnxruntime.__version__}, CUDA, {self._device.name}, "
            f"{self._precision}{graph}"
        )

    def bind(self, buffers: DeviceBuffers) -> OrtCudaBinding:
        """Take the addresses of the network's inputs and outputs.

        Raises:
            LifecycleError: the backend is closed.
        """
        self._open()
        return OrtCudaBinding(self, self._device, buffers)

    def close(self) -> None:
        """Release the network; sessions live as long as their bindings. Idempotent."""
        self._network = None

    def session(self, stream: int, rows: int) -> Any:
        """A session on this stream whose batch is ``rows``.

        Raises:
            BackendError: ONNX Runtime refuses the network, or would run part of it on the CPU.
            BackendUnavailableError: its CUDA provider cannot be loaded.
            NetworkMismatchError: its tensors are not those of the manifest.
        """
        library = self._onnxruntime
        options = library.SessionOptions()
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        for name in self._batch_names:
            options.add_free_dimension_override_by_name(name, rows)
        provider = {**self._options, "user_compute_stream": str(stream)}
        try:
            session = library.InferenceSession(
                self._open(), options, providers=[(_PROVIDER, provider)], enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime raises many unrelated types
            raise self.failure("load the network", error) from error
        session.disable_fallback()
        providers = session.get_providers()
        if providers[:1] != [_PROVIDER]:
            raise BackendUnavailableError(
                f"ONNX Runtime {library.__version__} could not load its CUDA provider and offers "
                f"{', '.join(providers)}. Install CUDA 13 and cuDNN 9 beside it: "
                "pip install nvidia-cuda-runtime nvidia-cublas nvidia-curand nvidia-cudnn-cu13, or "
                "use device='cpu'."
            )
        self._check_tensors(session, rows)
        return session

    def replay_options(self) -> Any:
        """Options of a run that must not wait for the device."""
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return options

    def failure(self, what: str, error: Exception) -> BackendError:
        """The error for something ONNX Runtime would not do, with its own words."""
        from ..errors import OutOfDeviceMemoryError

        library = f"ONNX Runtime {self._onnxruntime.__version__}"
        words = str(error)
        if re.search(r"out ?of ?memory|failed to allocate", words.replace("_", " "), re.IGNORECASE):
            return OutOfDeviceMemoryError(
                f"{library} cannot {what}: {words}. Choose a smaller batch size, or free memory "
                "that other processes hold on this GPU."
            )
        remedy = "Export the checkpoint again with ddpm-export, or use --backend tensorrt."
        if self._precision == "bf16":
            remedy = (
                "Where its CUDA provider has no bfloat16 kernel, export with --precision fp16, or "
                "use --backend tensorrt."
            )
        return BackendError(f"{library} cannot {what}: {words}. {remedy}")

    def _open(self) -> bytes:
        if self._network is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        return self._network

    def _check_tensors(self, session: Any, rows: int) -> None:
        expected = {
            name: ("tensor(int64)" if name == "label" else "tensor(float)", [rows, *dimensions])
            for name, dimensions in _tensors(self.shape).items()
        }
        arguments = [*session.get_inputs(), *session.get_outputs()]
        found = {argument.name: (argument.type, list(argument.shape)) for argument in arguments}
        if found != expected:
            raise NetworkMismatchError(
                f"the manifest describes the tensors {expected}; the network has {found}. "
                "Export the checkpoint again with ddpm-export."
            )


class OrtCudaBinding:
    """Sessions bound to buffers, one for each number of rows; see :meth:`OrtCudaBackend.bind`."""

    capture_safe = False

    def __init__(self, backend: OrtCudaBackend, device: Device, buffers: DeviceBuffers) -> None:
        self._backend: OrtCudaBackend | None = backend
        self._device = device
        self._buffers = buffers
        self._runs: dict[int, tuple[int, Any, Any]] = {}
        self._replay: Any = backend.replay_options()

    def prepare(self, stream: int, rows: int) -> None:
        """Make the session for so many rows, bind it, and run it until its graph is captured.

        ONNX Runtime keeps a graph for each thread: the thread that prepares is the one to enqueue.

        Raises:
            BackendError: the library refuses.
            ConfigurationError: the default stream.
            LifecycleError: the binding is closed.
        """
        backend = self._open()
        if not stream:
            raise ConfigurationError("ONNX Runtime needs a stream of its own, not the default one.")
        if not 1 <= rows <= self._buffers.rows:
            raise BackendError(
                f"{rows} rows were asked for; these buffers hold 1 to {self._buffers.rows}."
            )
        if rows in self._runs and self._runs[rows][0] == stream:
            return
        session = backend.session(stream, rows)
        io_binding = self._bind(session, backend, rows)
        try:
            for _ in range(_RUNS_TO_CAPTURE):
                session.run_with_iobinding(io_binding)
        except Exception as error:  # ONNX Runtime raises many unrelated types
            raise backend.failure(f"run {rows} rows", error) from error
        self._device.driver.call("cuStreamSynchronize", stream, purpose="run the network once")
        self._runs[rows] = stream, session, io_binding

    def enqueue(self, stream: int, rows: int) -> None:
        """Evaluate rows [0, rows) in stream order; returns at once.

        Raises:
            BackendError: the library failed.
            LifecycleError: closed, or not prepared for so many rows on this stream.
        """
        backend = self._open()
        run = self._runs.get(rows)
        if run is None or run[0] != stream:
            raise LifecycleError(f"call prepare(stream, {rows}) before enqueue(stream, {rows}).")
        _, session, io_binding = run
        try:
            session.run_with_iobinding(io_binding, self._replay)
        except Exception as error:  # ONNX Runtime raises many unrelated types
            raise backend.failure(f"run {rows} rows", error) from error

    def close(self) -> None:
        """Release sessions and their memory. Idempotent."""
        self._backend = None
        self._runs.clear()

    def _open(self) -> OrtCudaBackend:
        if self._backend is None:
            raise LifecycleError("this binding is closed; bind the buffers again.")
        return self._backend

    def _bind(self, session: Any, backend: OrtCudaBackend, rows: int) -> Any:
        """Bind the first ``rows`` rows of the buffers, by device address."""
        io_binding = session.io_binding()
        for name, dimensions in _tensors(backend.shape).items():
            bind = io_binding.bind_output if name == "prediction" else io_binding.bind_input
            element = np.int64 if name == "label" else np.float32
            address = getattr(self._buffers, name)
            bind(name, "cuda", backend.ordinal, element, (rows, *dimensions), address)
        return io_binding


def _tensors(shape: NetworkShape) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network without its batch dimension."""
    channels, height, width = shape.image
    tensors: dict[str, tuple[int, ...]] = {"sample": (channels, height, width), "timestep": ()}
    if shape.num_classes:
        tensors["label"] = ()
    tensors["prediction"] = (shape.prediction_channels, height, width)
    return tensors


def _batch_names(onnx_bytes: bytes) -> Iterator[str]:
    """The name of each input's first dimension, read from the protobuf wire format.

    Fields: ModelProto.graph 7, GraphProto.input 11, ValueInfoProto.name 1 and .type 2,
    TypeProto.tensor_type 1, its shape 2, TensorShapeProto.dim 1, Dimension.dim_param 2.
    """
    try:
        for graph in _fields(memoryview(onnx_bytes), 7):
            for value in _fields(graph, 11):
                (kind,) = _fields(value, 2)
                (tensor,) = _fields(kind, 1)
                (shape,) = _fields(tensor, 2)
                first = next(_fields(shape, 1))
                names = [bytes(name).decode() for name in _fields(first, 2)]
                if not names:
                    (name,) = _fields(value, 1)
                    raise NetworkMismatchError(
                        f"the batch of input {bytes(name).decode()!r} is fixed in the network. "
                        "Export the checkpoint again with ddpm-export."
                    )
                yield names[0]
    except (ValueError, IndexError, StopIteration) as error:
        raise NetworkMismatchError(
            f"the network's inputs cannot be read: {error or 'they have no shape'}. Export the "
            "checkpoint again with ddpm-export."
        ) from error


def _fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The contents of every length-delimited field of this number, in order."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            _, position = _varint(message, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        elif kind == 2:
            size, position = _varint(message, position)
            if size > len(message) - position:
                raise ValueError("a field is longer than the file")
            if tag >> 3 == number:
                yield message[position : position + size]
            position += size
        else:
            raise ValueError(f"wire type {kind}")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
