"""How the operators that ONNX can spell in several ways are written.

GroupNorm is Reshape → InstanceNormalization → Reshape → Mul → Add, with constant shapes in which
only the batch is inferred (−1). Native GroupNormalization (opset 21) would be one node, but ONNX
Runtime has no CPU kernel for it and expands each into 15: measured on one core with 1.31, the
shipped 28×28 network takes 14 % more CPU time per evaluation at batch 1 (2.72 against 2.39 ms) and
9 % more at batch 8; the 35.7 M-parameter CIFAR-10 network 5 %. LayerNormalization over the groups
lies in between. TensorRT parses all of them.

Attention is MatMul → Softmax → MatMul with the scale on the query: TensorRT refuses the Attention
operator (opset 23) in float32, and scaling before the product keeps low-precision graphs in range.

Both are written here because the exporter's own spelling computes shapes at run time: 31 Shape
nodes in the shipped network, none this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript import opset18

from ddpm_runtime.errors import CheckpointError

__all__ = ["TRANSLATIONS"]

op: Any = opset18  # its annotations are narrower than what it takes


def _group_norm(
    input: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """(input − mean) / √(variance + eps) over each group, then · weight + bias for each channel.

    The exporter passes arguments by the names PyTorch gives them.

    Source: Wu & He, arXiv 1803.08494 eq. 1 to 3.
    """
    channels, *pixels = (int(dimension) for dimension in input.shape[1:])
    grouped = op.Reshape(input, op.Constant(value_ints=[0, num_groups, -1]))
    normal = op.InstanceNormalization(
        grouped,
        op.Constant(value_floats=[1.0] * num_groups),
        op.Constant(value_floats=[0.0] * num_groups),
        epsilon=eps,
    )
    normal = op.Reshape(normal, op.Constant(value_ints=[-1, channels, *pixels]))
    axes = op.Constant(value_ints=list(range(1, 1 + len(pixels))))
    if weight is not None:
        normal = op.Mul(normal, op.Unsqueeze(weight, axes))
    return normal if bias is None else op.Add(normal, op.Unsqueeze(bias, axes))


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """softmax(query · keyᵀ · scale) · value, with scale = 1/√d unless given.

    Source: Vaswani et al., arXiv 1706.03762 eq. 1.
    """
    if attn_mask is not None or is_causal or enable_gqa or dropout_p:
        raise CheckpointError(
            "this network's attention has a mask, dropout or grouped heads; only plain attention "
            "can be exported."
        )
    factor = 1.0 / math.sqrt(int(query.shape[-1])) if scale is None else scale
    scaled = op.Mul(query, op.Constant(value_float=factor))
    scores = op.MatMul(scaled, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(scores, axis=-1), value)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
}
