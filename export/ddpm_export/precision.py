"""Lower a network to float16 or bfloat16, strongly typed: precision lives in the ONNX graph.

    float32 network ──▶ which nodes stay (precision_rules) ──▶ casts between the two ──▶ checked

Graph inputs and outputs keep their types, as the bundle contract says. Every tensor has one type in
which it is made, and is cast at most once to the other, so no cast undoes another. TensorRT takes
the result as it stands: its strongly typed networks run in exactly these types. Must not import
torch or an inference library.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from ddpm_runtime.errors import ConfigurationError, ParityError, choose

from .destination import PRECISIONS
from .precision_graph import LowPrecision, TypedGraph, low_precision, typed_graph
from .precision_rules import FIXED_FLOAT32_INPUTS, float32_nodes

__all__ = ["WeightLoss", "lower_precision", "weight_losses"]


def lower_precision(onnx_bytes: bytes, precision: str) -> bytes:
    """Write a float32 network in another precision.

    Normalisation, softmax, the time embedding, the activations behind a normalisation, and the
    first and last layer stay in float32. bf16 raises the opset to 22, the first whose convolution
    takes it. "fp32" returns the bytes it was given.

    Args:
        onnx_bytes: a float32 network with inputs "sample", "timestep" and perhaps "label".
        precision: "fp32", "fp16" or "bf16".

    Returns:
        The network, accepted by onnx's full checker. The same bytes for the same input.

    Raises:
        ConfigurationError: an unknown precision, or a network this pass cannot read.
        ParityError: a weight is too large for the type; the message names its layer.
    """
    if choose("precision", precision, PRECISIONS) == "fp32":
        return onnx_bytes
    low = low_precision(precision)
    graph = typed_graph(onnx_bytes, least_opset=low.least_opset)
    if TensorProto.FLOAT16 in graph.types.values() or TensorProto.BFLOAT16 in graph.types.values():
        raise ConfigurationError(
            "the network is in sixteen bits already; lower the float32 network it came from."
        )
    _Writer(graph, low).write()
    try:
        onnx.checker.check_model(graph.model, full_check=True)
    except Exception as error:  # the checker raises several unrelated types
        raise ConfigurationError(
            f"the network in {precision} is not valid ONNX: {error}. Export with --precision fp32, "
            "and report the operator."
        ) from error
    lowered: bytes = graph.model.SerializeToString(deterministic=True)
    return lowered


@dataclass(frozen=True, kw_only=True)
class WeightLoss:
    """What one lowered parameter loses.

    Args:
        layer: who reads it ("Conv down.3.residual.conv1").
        name: the parameter.
        relative_error: ‖rounded − w‖ / ‖w‖; an ordinary one is near 2^−12 in fp16, 2^−9 in bf16.
        largest: largest magnitude in float32.
        overflowed: finite values that became infinite.
        subnormal: values below the type's smallest normal number, which keep fewer digits.
        flushed: those of them that became zero.
        values: how many values it has.
    """

    layer: str
    name: str
    relative_error: float
    largest: float
    overflowed: int
    subnormal: int
    flushed: int
    values: int


def weight_losses(onnx_bytes: bytes, precision: str) -> list[WeightLoss]:
    """What each parameter of a float32 network would lose, the worst first.

    Raises:
        ConfigurationError: "fp32" or an unknown precision, or a network that cannot be read.
    """
    low = low_precision(precision)
    graph = typed_graph(onnx_bytes, least_opset=low.least_opset)
    writer = _Writer(graph, low)
    losses = [
        _loss(writer.layer_reading(name), name, graph.array(name), low)
        for name, types in writer.constant_types().items()
        if low.onnx_type in types
    ]
    return sorted(losses, key=lambda loss: (-loss.overflowed, -loss.relative_error, loss.name))


class _Writer:
    """Rewrites a graph in place; ``native`` holds the type in which each tensor is made."""

    def __init__(self, graph: TypedGraph, low: LowPrecision) -> None:
        self._graph = graph
        self._low = low
        self._float32 = float32_nodes(graph, low)
        self._native: dict[str, int] = {}
        for index, node in enumerate(graph.nodes):
            for name in node.output:
                if graph.is_float32(name):
                    self._native[name] = self._type_of(index)
        self._nodes: list[NodeProto] = []
        self._in_type: dict[tuple[str, int], str] = {}

    def write(self) -> None:
        """Replace the model's nodes and initializers."""
        graph = self._graph
        initializers = self._written_constants()
        for name in graph.inputs:
            self._in_type[name, graph.types[name]] = name
        for index, node in enumerate(graph.nodes):
            empty_cast = self._is_empty_cast(node)
            for position, name in enumerate(node.input):
                if graph.is_float32(name):
                    node.input[position] = self._read(name, self._type_read(index, position))
            if empty_cast:
                self._in_type[node.output[0], self._type_of(index)] = node.input[0]
                continue
            self._nodes.append(node)
            # graph outputs need no cast: whatever makes them stays in float32
            for name in node.output:
                if graph.is_float32(name):
                    self._in_type[name, self._native[name]] = name
        body = graph.model.graph
        del body.node[:], body.initializer[:], body.value_info[:]
        body.node.extend(self._nodes)
        body.initializer.extend(initializers)

    def constant_types(self) -> dict[str, set[int]]:
        """The types in which each float constant is read."""
        types: dict[str, set[int]] = defaultdict(set)
        for index, node in enumerate(self._graph.nodes):
            for position, name in enumerate(node.input):
                if name in self._graph.constants and self._graph.is_float32(name):
                    types[name].add(self._type_read(index, position))
        return types

    def layer_reading(self, name: str) -> str:
        """The layer that reads a constant."""
        return self._graph.layer(self._graph.readers[name][0])

    def _type_of(self, index: int) -> int:
        return TensorProto.FLOAT if index in self._float32 else self._low.onnx_type

    def _type_read(self, index: int, position: int) -> int:
        """The type in which a node reads one of its float inputs."""
        node = self._graph.nodes[index]
        if position in FIXED_FLOAT32_INPUTS.get(node.op_type, ()):
            return int(TensorProto.FLOAT)
        if node.op_type in ("Shape", "Size"):  # a shape has no precision: no cast for it
            return self._native.get(node.input[position], TensorProto.FLOAT)
        return self._type_of(index)

    def _written_constants(self) -> list[TensorProto]:
        """Initializers as the new graph has them; a parameter keeps its name where it can."""
        graph, low = self._graph, self._low
        types = self.constant_types()
        written = []
        for name, tensor in graph.constants.items():
            if not graph.is_float32(name):
                if name in graph.readers:
                    written.append(tensor)
                continue
            for onnx_type in sorted(types[name]):
                copy = tensor
                if onnx_type == low.onnx_type:
                    alone = len(types[name]) == 1
                    copy = self._lowered(tensor, name if alone else f"{name}_{low.name}")
                self._in_type[name, onnx_type] = copy.name
                written.append(copy)
        return written

    def _lowered(self, tensor: TensorProto, name: str) -> TensorProto:
        loss = _loss(
            self.layer_reading(tensor.name),
            tensor.name,
            self._graph.array(tensor.name),
            self._low,
        )
        if loss.overflowed:
            raise ParityError(
                f"{loss.overflowed} of {loss.values} values of {loss.name!r} ({loss.layer}) "
                f"overflow {self._low.name}: they reach {loss.largest:.3g}, it holds "
                f"{self._low.largest:.6g}. Export with --precision bf16 or fp32."
            )
        array = self._graph.array(tensor.name).astype(self._low.numpy_type)
        return numpy_helper.from_array(array, name)

    def _read(self, name: str, onnx_type: int) -> str:
        """The name of a tensor in a type; makes the cast the first time it is asked for."""
        key = name, onnx_type
        if key not in self._in_type:
            suffix = "fp32" if onnx_type == TensorProto.FLOAT else self._low.name
            other = TensorProto.FLOAT if onnx_type != TensorProto.FLOAT else self._low.onnx_type
            cast = _cast(self._in_type[name, other], f"{name}_{suffix}", onnx_type)
            self._nodes.append(cast)
            self._in_type[key] = cast.output[0]
        return self._in_type[key]

    def _is_empty_cast(self, node: NodeProto) -> bool:
        """Whether a node of the source casts float32 to float32; it may be left out."""
        return (
            node.op_type == "Cast"
            and self._graph.is_float32(node.input[0])
            and self._graph.is_float32(node.output[0])
            and node.output[0] not in self._graph.outputs
        )


def _loss(layer: str, name: str, array: NDArray[np.float32], low: LowPrecision) -> WeightLoss:
    rounded = low.round(array)
    finite = np.isfinite(array)
    overflowed = finite & ~np.isfinite(rounded)
    magnitude = np.abs(array)
    known = finite & ~overflowed
    difference = np.where(known, rounded - np.where(known, array, 0), 0).astype(np.float64)
    norm = float(np.linalg.norm(np.where(finite, array, 0).astype(np.float64)))
    return WeightLoss(
        layer=layer,
        name=name,
        relative_error=float(np.linalg.norm(difference)) / norm if norm else 0.0,
        largest=float(magnitude[finite].max(initial=0.0)),
        overflowed=int(overflowed.sum()),
        subnormal=int(((magnitude > 0) & (magnitude < low.smallest_normal)).sum()),
        flushed=int(((array != 0) & (rounded == 0)).sum()),
        values=array.size,
    )


def _cast(source: str, destination: str, onnx_type: int) -> NodeProto:
    return helper.make_node(
        "Cast", [source], [destination], to=onnx_type, name=f"cast_{destination}"
    )
