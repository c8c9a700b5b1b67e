"""A real engine bundle of a few hundred bytes: an ONNX network made by hand, no PyTorch.

prediction = conv3×3(sample) · 0.1 + embedding[label] + timestep · 1e-4
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ddpm_runtime.bundle import Defaults, Image, Manifest, Network, write_bundle

CLASS_NAMES = ("circle", "square", "star")


def tiny_network_bytes(
    *, size: int = 8, channels: int = 1, num_classes: int = 3, seed: int = 0
) -> bytes:
    """The ONNX file; every weight drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    constants = {
        "kernel": (0.1 * rng.normal(size=(channels, channels, 3, 3))).astype(np.float32),
        "per_step": np.float32([1e-4]).reshape(1),
        "column": np.array([-1, 1, 1, 1], np.int64),
    }
    nodes = [
        helper.make_node("Conv", ["sample", "kernel"], ["mixed"], pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["timestep", "per_step"], ["scaled"]),
        helper.make_node("Reshape", ["scaled", "column"], ["shift"]),
    ]
    inputs = [
        helper.make_tensor_value_info("sample", TensorProto.FLOAT, ["n", channels, size, size]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, ["n"]),
    ]
    last = "shifted"
    nodes.append(helper.make_node("Add", ["mixed", "shift"], [last]))
    if num_classes:
        constants["embedding"] = rng.normal(size=(num_classes + 1, channels, 1, 1)).astype("f4")
        nodes.append(helper.make_node("Gather", ["embedding", "label"], ["class_shift"]))
        nodes.append(helper.make_node("Add", [last, "class_shift"], ["classed"]))
        inputs.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["n"]))
        last = "classed"
    nodes.append(helper.make_node("Identity", [last], ["prediction"]))
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        [
            helper.make_tensor_value_info(
                "prediction", TensorProto.FLOAT, ["n", channels, size, size]
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def write_tiny_engine(
    path: Path, *, size: int = 8, channels: int = 1, num_classes: int = 3, **defaults: object
) -> Path:
    """Write the bundle; ``defaults`` are fields of :class:`~ddpm_runtime.bundle.Defaults`."""
    manifest = Manifest(
        name="tiny",
        image=Image(height=size, width=size, channels=channels),
        network=Network(
            prediction_type="epsilon",
            num_classes=num_classes,
            class_names=CLASS_NAMES[:num_classes],
            opset=18,
        ),
        schedule={"name": "linear", "num_train_timesteps": 100},
        defaults=Defaults(**{"steps": 10, **defaults}),
    )
    network = tiny_network_bytes(size=size, channels=channels, num_classes=num_classes)
    write_bundle(path, manifest, network)
    return path
