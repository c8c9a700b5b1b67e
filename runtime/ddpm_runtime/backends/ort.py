"""ONNX Runtime on the CPU: buffers bound once, no copies, no allocation per step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..bundle import Bundle
from ..errors import (
    BackendError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
    missing_extra,
)
from .base import NetworkBinding, NetworkShape, allocate_buffers
from .processors import usable_processors

__all__ = ["OrtBackend", "open_ort"]

_TYPES = {"sample": "tensor(float)", "timestep": "tensor(float)", "label": "tensor(int64)"}


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
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or usable_processors()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            bundle.network_bytes, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises many unrelated types
        remedy = "Export the checkpoint again with ddpm-export."
        if bundle.manifest.network.precision == "bf16":
            remedy = (
                "It computes no bfloat16 on the processor: use device='cuda', or the fp32 bundle "
                "with backend='openvino', precision='bf16' (pip install 'ddpm-engine[openvino]')."
            )
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the network: {error}. {remedy}"
        ) from error
    shape = NetworkShape.from_bundle(bundle)
    _check_signature(session, shape)
    description = (
        f"ONNX Runtime {onnxruntime.__version__}, CPU, {options.intra_op_num_threads} thread(s), "
        f"{bundle.manifest.network.precision}"
    )
    return OrtBackend(session, shape, description)


class OrtBackend:
    """A network in ONNX Runtime; make it with :func:`open_ort`."""

    name = "onnxruntime"

    def __init__(self, session: Any, shape: NetworkShape, description: str) -> None:
        self._session = session
        self.shape = shape
        self.description = description

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows.

        Raises:
            LifecycleError: the backend is closed.
        """
        if self._session is None:
            raise LifecycleError("this backend is closed; load the engine again.")
        bound: dict[int, Any] = {}

        def run(binding: NetworkBinding, rows: int) -> None:
            session = self._session
            if session is None:
                raise LifecycleError("this backend is closed; load the engine again.")
            if rows not in bound:
                bound[rows] = _bind(session, binding, rows)
            try:
                session.run_with_iobinding(bound[rows])
            except Exception as error:  # ONNX Runtime raises many unrelated types
                raise BackendError(
                    f"ONNX Runtime failed on {rows} network rows: {error}"
                ) from error

        return allocate_buffers(self.shape, capacity, run)

    def close(self) -> None:
        """Release the network. Idempotent."""
        self._session = None


def _bind(session: Any, binding: NetworkBinding, rows: int) -> Any:
    """Bind the first ``rows`` rows of the buffers, by address."""
    io_binding = session.io_binding()
    wanted = {argument.name for argument in session.get_inputs()}
    for name in ("sample", "timestep", "label"):
        if name in wanted:
            array = getattr(binding, name)[:rows]
            io_binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    prediction = binding.prediction[:rows]
    io_binding.bind_output(
        "prediction", "cpu", 0, np.float32, prediction.shape, prediction.ctypes.data
    )
    return io_binding


def _check_signature(session: Any, shape: NetworkShape) -> None:
    """Compare the graph's inputs and outputs with what the manifest promises."""
    expected: dict[str, tuple[str, list[int]]] = {
        "sample": (_TYPES["sample"], list(shape.image)),
        "timestep": (_TYPES["timestep"], []),
    }
    if shape.num_classes:
        expected["label"] = (_TYPES["label"], [])
    # a dimension that is not a number is dynamic; only the batch may be
    found = {i.name: (i.type, list(i.shape[1:])) for i in session.get_inputs()}
    if found != expected:
        raise NetworkMismatchError(
            f"the manifest describes inputs {expected}; the network has {found}. "
            "Export the checkpoint again with ddpm-export."
        )
    promised = {"prediction": ("tensor(float)", [shape.prediction_channels, *shape.image[1:]])}
    produced = {o.name: (o.type, list(o.shape[1:])) for o in session.get_outputs()}
    if produced != promised:
        raise NetworkMismatchError(
            f"the manifest describes outputs {promised}; the network has {produced}. "
            "Export the checkpoint again with ddpm-export."
        )
