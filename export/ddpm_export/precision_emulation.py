"""What a lowered network computes, on a machine that has no kernels for its type.

    lowered network ──▶ float32 network that rounds wherever the lowered one holds sixteen bits

Each operator works in float32 and its result is rounded once: what a GPU does that sums in float32.
A GPU library that fuses operators rounds less often, so this is the pessimistic side. It is needed
because ONNX Runtime's CPU provider has no bfloat16 layers at all (1.31: Conv, Gemm, MatMul, Add,
Mul, Resize are "not implemented"), and because it runs float16 partly in float32 without rounding
in between, which flatters the figures and hides overflow. Must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ddpm_runtime.errors import BackendError

from .precision_graph import LOW_PRECISIONS, LowPrecision, TypedGraph, typed_graph
from .precision_rules import COPIES

__all__ = ["ActivationPeak", "activation_peaks", "emulated"]

_LOW_TYPES = {low.onnx_type: low for low in LOW_PRECISIONS.values()}
_EXACT = "__exact"
_PEAK = "__peak"


@dataclass(frozen=True, kw_only=True)
class ActivationPeak:
    """The largest value that some evaluations put into one tensor of sixteen bits.

    Args:
        layer: who makes it ("Conv down.3.residual.conv1", "Add after middle.0.conv2").
        tensor: its name in the network.
        peak: largest magnitude before rounding.
        largest: the largest finite value of the type.
        overflows: whether rounding made it infinite, or it was no finite number before.
    """

    layer: str
    tensor: str
    peak: float
    largest: float
    overflows: bool

    def __str__(self) -> str:
        """One line: who, how large, against what."""
        return (
            f"{self.layer} (tensor {self.tensor!r}) reaches {self.peak:.3g}; "
            f"the type holds {self.largest:.6g}"
        )


def emulated(lowered: bytes) -> bytes:
    """A float32 network that answers as a lowered one, rounding included.

    Args:
        lowered: what :func:`~ddpm_export.precision.lower_precision` returned; a float32 network
            comes back unchanged in meaning.

    Returns:
        A network with the same inputs and outputs, in which every tensor of sixteen bits is a
        float32 tensor of the same name that holds the rounded values.
    """
    network: bytes = _emulation(typed_graph(lowered)).SerializeToString(deterministic=True)
    return network


def activation_peaks(
    lowered: bytes, evaluations: list[dict[str, NDArray[np.generic]]], *, threads: int = 0
) -> list[ActivationPeak]:
    """The largest value in every sixteen-bit tensor, in the order in which they are made.

    So the first one that overflows is where the trouble starts.

    Args:
        lowered: a lowered network.
        evaluations: inputs by name, one dictionary an evaluation.
        threads: of ONNX Runtime; 0 lets it choose.

    Raises:
        BackendError: ONNX Runtime cannot run the emulation.
    """
    graph = typed_graph(lowered)
    made = [
        (index, name, _LOW_TYPES[graph.types[name]])
        for index, node in enumerate(graph.nodes)
        for name in node.output
        if graph.types.get(name) in _LOW_TYPES and node.op_type not in COPIES
    ]
    layers = [graph.layer(index) for index, _, _ in made]
    model = _emulation(graph)
    body = model.graph
    for _, name, _ in made:
        body.node.append(helper.make_node("Abs", [name + _EXACT], [name + "__abs"]))
        body.node.append(
            helper.make_node("ReduceMax", [name + "__abs"], [name + _PEAK], keepdims=0)
        )
        body.output.append(helper.make_tensor_value_info(name + _PEAK, TensorProto.FLOAT, []))
    outputs = [name + _PEAK for _, name, _ in made]
    peaks = _largest(model.SerializeToString(), outputs, evaluations, threads)
    return [
        ActivationPeak(
            layer=layer,
            tensor=name,
            peak=float(peak),
            largest=low.largest,
            overflows=not np.isfinite(low.round(peak)),
        )
        for layer, (_, name, low), peak in zip(layers, made, peaks, strict=True)
    ]


def _largest(
    network: bytes,
    outputs: list[str],
    evaluations: list[dict[str, NDArray[np.generic]]],
    threads: int,
) -> NDArray[np.float32]:
    """The largest of each scalar output over the evaluations; NaN wins over everything."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
        answers = [session.run(outputs, inputs) for inputs in evaluations]
    except Exception as error:  # ONNX Runtime raises many unrelated types
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot run the emulated network: {error}."
        ) from error
    largest: NDArray[np.float32] = np.array(answers, np.float32).max(axis=0)
    return largest


def _emulation(graph: TypedGraph) -> onnx.ModelProto:
    """Rewrite a lowered graph in place; see :func:`emulated`."""
    body = graph.model.graph
    for tensor in body.initializer:
        if tensor.data_type in _LOW_TYPES:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        lows = [(k, _LOW_TYPES.get(graph.types.get(name, 0))) for k, name in enumerate(node.output)]
        _work_in_float32(node)
        nodes.append(node)
        for position, low in lows:
            if low is not None and node.op_type not in COPIES:
                nodes += _rounding(node, position, low)
    del body.node[:], body.value_info[:]
    body.node.extend(nodes)
    return graph.model


def _work_in_float32(node: NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _LOW_TYPES:
            attribute.i = TensorProto.FLOAT


def _rounding(node: NodeProto, position: int, low: LowPrecision) -> list[NodeProto]:
    """Let the node make an exact tensor, and round it to the one that the others read."""
    name = node.output[position]
    node.output[position] = name + _EXACT
    down = helper.make_node("Cast", [name + _EXACT], [f"{name}__{low.name}"], to=low.onnx_type)
    up = helper.make_node("Cast", [f"{name}__{low.name}"], [name], to=TensorProto.FLOAT)
    return [down, up]
