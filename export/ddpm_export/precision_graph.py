"""An ONNX graph whose tensor types are all known: what the precision pass reads and rewrites.

Owns loading, opset raising, type inference and look-ups (who makes a tensor, who reads it). Float
``Constant`` nodes become initializers here, so that later files know one kind of constant. It must
not import torch or an inference library.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ddpm_runtime.errors import ConfigurationError, choose

__all__ = ["LOW_PRECISIONS", "LowPrecision", "TypedGraph", "low_precision", "typed_graph"]


@dataclass(frozen=True, kw_only=True)
class LowPrecision:
    """A floating-point type of sixteen bits.

    Args:
        name: as ``--precision`` takes it.
        onnx_type: the ``TensorProto`` element type.
        numpy_type: what NumPy calls it.
        least_opset: the first opset whose Conv, MatMul and others take this type.
        largest: the largest finite value.
        smallest_normal: the smallest positive value with all its digits.
        float32_operators: operators that only move data and stay in float32 all the same, because
            a library that we run on has no kernel for them in this type.
    """

    name: str
    onnx_type: int
    numpy_type: np.dtype[np.generic]
    least_opset: int
    largest: float
    smallest_normal: float
    float32_operators: frozenset[str] = frozenset()

    def round(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values rounded to this type (to nearest, ties to even), as float32."""
        with np.errstate(over="ignore"):
            return values.astype(self.numpy_type).astype(np.float32)


LOW_PRECISIONS = {
    "fp16": LowPrecision(
        name="fp16",
        onnx_type=TensorProto.FLOAT16,
        numpy_type=np.dtype(np.float16),
        least_opset=13,
        largest=65504.0,
        smallest_normal=2.0**-14,
    ),
    "bf16": LowPrecision(
        name="bf16",
        onnx_type=TensorProto.BFLOAT16,
        numpy_type=np.dtype(ml_dtypes.bfloat16),
        least_opset=22,
        largest=(2.0 - 2.0**-7) * 2.0**127,
        smallest_normal=2.0**-126,
        # ONNX Runtime 1.31's CUDA provider has bfloat16 for every other operator of these networks
        float32_operators=frozenset({"Resize"}),
    ),
}


def low_precision(name: str) -> LowPrecision:
    """The type called ``name``.

    Raises:
        ConfigurationError: there is no such type of sixteen bits.
    """
    return LOW_PRECISIONS[choose("low precision", name, LOW_PRECISIONS)]


class TypedGraph:
    """Nodes in topological order, the type of every tensor, makers and readers.

    Args:
        model: a checked model; owned from here on.
        types: element type of every tensor by name.
    """

    def __init__(self, model: ModelProto, types: dict[str, int]) -> None:
        self.model = model
        self.types = types
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants: dict[str, TensorProto] = {t.name: t for t in model.graph.initializer}
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self.maker: dict[str, int] = {}
        self.readers: dict[str, list[int]] = defaultdict(list)
        for index, node in enumerate(self.nodes):
            self.maker.update((name, index) for name in node.output if name)
            for name in node.input:
                if name:
                    self.readers[name].append(index)

    def is_float32(self, name: str) -> bool:
        """Whether the tensor is float32."""
        return self.types.get(name) == TensorProto.FLOAT

    def float_inputs(self, node: NodeProto) -> list[str]:
        """Names of the node's float32 inputs that are not constants."""
        return [n for n in node.input if self.is_float32(n) and n not in self.constants]

    def array(self, name: str) -> NDArray[np.float32]:
        """The values of a float32 constant."""
        values: NDArray[np.float32] = numpy_helper.to_array(self.constants[name])
        return values

    def layer(self, index: int) -> str:
        """What to call a node when speaking to people: its weight's name if it has one.

        "Conv down.3.residual.conv1" for a layer with weights; the operator, and the nearest layer
        above it, for the others.
        """
        node = self.nodes[index]
        own = self._weight(node)
        if own:
            return f"{node.op_type} {own}"
        seen, frontier = {index}, [index]
        while frontier:
            makers = [
                self.maker[name]
                for at in frontier
                for name in self.nodes[at].input
                if name in self.maker
            ]
            frontier = [at for at in dict.fromkeys(makers) if at not in seen]
            seen.update(frontier)
            for at in frontier:
                above = self._weight(self.nodes[at])
                if above:
                    return f"{node.op_type} after {above}"
        return f"{node.op_type} {node.name or node.output[0]}"

    def _weight(self, node: NodeProto) -> str | None:
        """Name of the layer that owns a parameter of the node ("conv_in" of "conv_in.weight")."""
        for name in node.input:
            stem, last = str(name).rpartition(".")[::2]
            if name in self.constants and stem and last in ("weight", "bias"):
                return stem
        return None


def typed_graph(onnx_bytes: bytes, *, least_opset: int = 1) -> TypedGraph:
    """Parse a network, raise its opset if need be, and infer the type of every tensor.

    Args:
        onnx_bytes: a network as the exporter wrote it. Never bytes of a stranger: the version
            converter and shape inference are native code.
        least_opset: the opset is raised to this when it is lower.

    Raises:
        ConfigurationError: not an ONNX network this pass can read: sub-graphs, functions, tensors
            of unknown type or in other files, or an operator that the version converter cannot
            raise.
    """
    try:
        model = onnx.load_model_from_string(onnx_bytes)
        _refuse_other_files(model)
        opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
        if opset < least_opset:
            model = onnx.version_converter.convert_version(model, least_opset)
        _refuse_control_flow(model)
        _constants_to_initializers(model)
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except ConfigurationError:
        raise
    except Exception as error:  # onnx and protobuf raise many unrelated types
        raise ConfigurationError(
            f"the precision pass cannot read the network: {error}. Give a float32 network that "
            "ddpm-export wrote."
        ) from error
    values = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    for node in model.graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise ConfigurationError(
                    f"the type of tensor {name!r} ({node.op_type}) cannot be inferred; export the "
                    "checkpoint again, and report the operator if it stays."
                )
    return TypedGraph(model, types)


def _refuse_control_flow(model: ModelProto) -> None:
    if model.functions:
        raise ConfigurationError("the network holds model-local functions; inline them first.")
    for node in model.graph.node:
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise ConfigurationError(
                f"the network holds a sub-graph ({node.op_type} {node.name}); networks here are "
                "straight graphs: export without data-dependent control flow."
            )


def _refuse_other_files(model: ModelProto) -> None:
    """A network that names other files could make us read one of this machine's."""
    constants = [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise ConfigurationError(
                f"the network keeps {tensor.name!r} in another file; a bundle's network holds all "
                "its weights. Export the checkpoint again with ddpm-export."
            )


def _constants_to_initializers(model: ModelProto) -> None:
    kept = []
    for node in model.graph.node:
        if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
            kept.append(node)
            continue
        array = _constant_value(node)
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _constant_value(node: NodeProto) -> NDArray[np.generic]:
    attribute = node.attribute[0]
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        array: NDArray[np.generic] = numpy_helper.to_array(value)
        return array
    if attribute.name in ("value_float", "value_floats"):
        return np.array(value, np.float32)
    if attribute.name in ("value_int", "value_ints"):
        return np.array(value, np.int64)
    raise ConfigurationError(f"constant {node.output[0]!r} holds {attribute.name}; not a number.")
