"""What a network costs, counted from its ONNX graph: floating point operations and bytes.

    convolution     2 · N · C_out · H_out · W_out · (C_in / groups) · k_h · k_w
    matrix product  2 · (elements of the result) · (length of the sum)
    anything else   one operation an element of its result (counted apart: it is memory-bound)

Bytes are the least that must move: weights once, input and output once. What an implementation
moves between layers on top is its own affair, and so is a faster algorithm (Winograd).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
from onnx import numpy_helper, shape_inference

__all__ = ["GraphCost", "count_graph"]

_FREE = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Slice", "Concat", "Identity", "Constant"}

Shapes = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class GraphCost:
    """One evaluation of ``batch`` rows.

    Args:
        batch: rows.
        product_flops: of convolutions and matrix products.
        other_flops: of everything else that computes.
        weight_bytes: of all weights.
        traffic_bytes: weights, inputs and outputs once.
        parameters: numbers among the weights.
        uncounted: operator types whose shapes are not known.
    """

    batch: int
    product_flops: int
    other_flops: int
    weight_bytes: int
    traffic_bytes: int
    parameters: int
    uncounted: tuple[str, ...]

    @property
    def flops_per_byte(self) -> float:
        """Arithmetic intensity."""
        return self.product_flops / self.traffic_bytes


def count_graph(network_bytes: bytes, batch: int) -> GraphCost:
    """Count one evaluation of a network whose only dynamic dimension is the batch.

    Args:
        network_bytes: the ONNX file.
        batch: rows, ≥ 1.
    """
    model = onnx.load_from_string(network_bytes)
    weights = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    weight_bytes = sum(numpy_helper.to_array(one).nbytes for one in model.graph.initializer)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    inferred = shape_inference.infer_shapes(model, data_prop=True)
    shapes: Shapes = {**weights, **_shapes(inferred)}
    products, others = 0, 0
    uncounted: set[str] = set()
    for node in inferred.graph.node:
        try:
            product = _product_flops(node, shapes)
            products += product
            if not product and node.op_type not in _FREE:
                others += math.prod(shapes[node.output[0]])
        except KeyError:
            uncounted.add(node.op_type)
    ends = (*model.graph.input, *model.graph.output)
    ends_bytes = 4 * sum(math.prod(shapes[value.name]) for value in ends)
    return GraphCost(
        batch=batch,
        product_flops=products,
        other_flops=others,
        weight_bytes=weight_bytes,
        traffic_bytes=weight_bytes + ends_bytes,
        parameters=sum(math.prod(dims) for dims in weights.values()),
        uncounted=tuple(sorted(uncounted)),
    )


def _product_flops(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Of a convolution or a matrix product; 0 for another operator.

    Raises:
        KeyError: a shape is not known.
    """
    if node.op_type == "Conv":
        kernel = shapes[node.input[1]]  # (C_out, C_in / groups, k_h, k_w)
        return 2 * math.prod(shapes[node.output[0]]) * math.prod(kernel[1:])
    if node.op_type == "MatMul":
        return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        length = shapes[node.input[0]][0 if transposed else 1]
        return 2 * math.prod(shapes[node.output[0]]) * length
    return 0


def _shapes(model: onnx.ModelProto) -> Shapes:
    """Of every value whose dimensions are all numbers."""
    graph, found = model.graph, {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            found[value.name] = [dim.dim_value for dim in dims]
    return found
