"""What the precision tests share: hand-made networks, one exported U-Net, ways to run them."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from ddpm_export.precision_table import untrained_bundle
from ddpm_runtime.bundle import Bundle
from ddpm_train.unet import UNetConfig

SMALL = UNetConfig(
    image_size=16,
    image_channels=1,
    channels=16,
    channel_multipliers=(1, 2),
    residual_blocks=1,
    attention_resolutions=(8,),
    num_classes=3,
    norm_groups=8,
)
FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
LOW = {"fp16": FLOAT16, "bf16": BFLOAT16}


@functools.cache
def small_unet() -> Bundle:
    """A U-Net with attention and labels, exported once for all tests."""
    return untrained_bundle(SMALL)


def graph_bytes(
    nodes, constants=None, *, inputs=None, outputs=None, opset=18, value_types=None
) -> bytes:
    """A network from (operator, inputs, outputs[, attributes]); "sample" is (n, 2, 4, 4)."""
    made = [
        helper.make_node(op, ins, outs, **(rest[0] if rest else {}))
        for op, ins, outs, *rest in nodes
    ]
    inputs = {"sample": (FLOAT, ["n", 2, 4, 4])} if inputs is None else inputs
    outputs = {"prediction": (FLOAT, ["n", None, None, None])} if outputs is None else outputs
    graph = helper.make_graph(
        made,
        "network",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def kernel(value=0.1, out=2, channels=2):
    """Weights of a 3×3 convolution, all equal."""
    return np.full((out, channels, 3, 3), value, np.float32)


def parsed(content: bytes):
    """Model, type of every tensor, maker of every tensor."""
    model = onnx.load_model_from_string(content)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in (*inferred.graph.value_info, *model.graph.input, *model.graph.output)
    }
    types.update((tensor.name, tensor.data_type) for tensor in model.graph.initializer)
    makers = {name: node for node in model.graph.node for name in node.output}
    return model, types, makers


def run(content: bytes, **inputs):
    """The network's first output in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    wanted = {argument.name for argument in session.get_inputs()}
    return session.run(None, {k: v for k, v in inputs.items() if k in wanted})[0]


def unet_inputs(rows=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((rows, 1, 16, 16)).astype(np.float32),
        "timestep": np.linspace(0, 999, rows).astype(np.float32),
        "label": np.arange(rows) % 4,
    }
