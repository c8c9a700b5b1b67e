"""The ONNX file: what it computes, what it holds, and what it must not hold."""

from __future__ import annotations

import copy
import os
import re
import site
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny_export import TINY
from torch import nn

from ddpm_export.onnx_graph import onnx_from_network
from ddpm_runtime.errors import CheckpointError, ConfigurationError
from ddpm_train.unet import UNet, UNetConfig


def run(network_bytes, sample, timestep, label):
    session = onnxruntime.InferenceSession(network_bytes, providers=["CPUExecutionProvider"])
    feed = {"sample": sample, "timestep": timestep, "label": label}
    return session.run(["prediction"], feed)[0]


def strings_of(message) -> list[str]:
    """Every text inside a protobuf message, at any depth."""
    found = []
    for field, value in message.ListFields():
        many = (
            value if not isinstance(value, (str, bytes)) and hasattr(value, "__len__") else [value]
        )
        for one in many:
            if field.type == field.TYPE_STRING:
                found.append(one)
            elif field.type == field.TYPE_BYTES and field.name == "s":
                found.append(one.decode())
            elif field.type == field.TYPE_MESSAGE:
                found += strings_of(one)
    return found


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_answers_as_pytorch_does_at_any_batch(network, network_bytes, batch):
    rng = np.random.default_rng(batch)
    sample = rng.normal(size=(batch, 1, 8, 8)).astype(np.float32)
    timestep = rng.uniform(0, 199, batch).astype(np.float32)
    label = rng.integers(0, 4, batch)
    with torch.no_grad():
        expected = network(*map(torch.tensor, (sample, timestep, label))).numpy()
    found = run(network_bytes, sample, timestep, label)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_names_types_and_shapes_are_those_of_the_contract(network_bytes):
    graph = onnx.load_model_from_string(network_bytes).graph

    def signature(values):
        return {
            value.name: (
                value.type.tensor_type.elem_type,
                [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
            )
            for value in values
        }

    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    assert signature(graph.input) == {
        "sample": (float32, ["batch", 1, 8, 8]),
        "timestep": (float32, ["batch"]),
        "label": (int64, ["batch"]),
    }
    assert signature(graph.output) == {"prediction": (float32, ["batch", 1, 8, 8])}


def test_a_network_without_classes_has_no_label_input():
    config = UNetConfig(
        image_size=4, image_channels=2, channels=4, channel_multipliers=(1,), residual_blocks=1,
        attention_resolutions=(), norm_groups=2,
    )  # fmt: skip
    graph = onnx.load_model_from_string(onnx_from_network(UNet(config).eval(), (2, 4, 4))).graph
    assert [value.name for value in graph.input] == ["sample", "timestep"]


def test_the_graph_computes_no_shapes_and_has_no_control_flow(network_bytes):
    model = onnx.load_model_from_string(network_bytes)
    used = Counter(node.op_type for node in model.graph.node)
    assert not used.keys() & {"Shape", "If", "Loop", "Scan", "Dropout", "RandomNormal", "Identity"}
    assert not model.functions
    assert {opset.domain for opset in model.opset_import} == {""}
    assert all(t.data_location != t.EXTERNAL for t in model.graph.initializer)


def test_no_path_of_this_machine_is_in_the_file(network_bytes):
    texts = strings_of(onnx.load_model_from_string(network_bytes))
    assert "sample" in texts  # the walk reaches names
    assert not [text for text in texts if "/" in text or "\\" in text or ".py" in text]
    for private in (os.getcwd(), str(Path.home()), *site.getsitepackages()):
        assert private.encode() not in network_bytes


def test_the_same_weights_give_the_same_bytes(network, network_bytes):
    assert onnx_from_network(copy.deepcopy(network), (1, 8, 8), num_classes=3) == network_bytes


class Wrapper(nn.Module):
    """In training mode, as a fresh module is, around a network in eval mode."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, sample, timestep, label):
        return self.network(sample, timestep, label)


def test_a_wrapper_left_in_training_mode_is_refused(network):
    wrapper = Wrapper(network)
    assert not network.training
    with pytest.raises(ConfigurationError, match=r"training mode.*Wrapper.*network\.eval\(\)"):
        onnx_from_network(wrapper, (1, 8, 8), num_classes=3)


def test_one_inner_module_in_training_mode_is_refused_by_name(network):
    changed = copy.deepcopy(network)
    changed.middle[0].dropout.train()
    with pytest.raises(ConfigurationError, match=r"middle\.0\.dropout"):
        onnx_from_network(changed, (1, 8, 8), num_classes=3)


def test_weights_that_are_not_finite_are_refused_by_name(network):
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.conv_in.bias[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        onnx_from_network(changed, (1, 8, 8), num_classes=3)


class Branching(nn.Module):
    """Its control flow depends on the data, which no ONNX trace can follow."""

    def forward(self, sample, timestep):
        return sample if sample.sum() > 0 else -sample


def test_a_network_that_cannot_be_traced_is_refused_in_one_line():
    with pytest.raises(CheckpointError, match="PyTorch cannot write this network as ONNX") as found:
        onnx_from_network(Branching().eval(), (1, 8, 8))
    assert len(str(found.value).splitlines()) == 1


class MaskedAttention(nn.Module):
    def forward(self, sample, timestep):
        return nn.functional.scaled_dot_product_attention(sample, sample, sample, is_causal=True)


def test_attention_that_would_be_exported_wrongly_is_refused():
    with pytest.raises(CheckpointError, match="only plain attention"):
        onnx_from_network(MaskedAttention().eval(), (1, 8, 8))


def test_attention_with_several_heads_and_a_scale_of_its_own_is_exported_right():
    class Attention(nn.Module):
        def forward(self, sample, timestep):
            heads = sample.reshape(-1, 2, 4, 8)
            return nn.functional.scaled_dot_product_attention(
                heads, heads.flip(2), heads * 2, scale=0.7
            ).reshape(-1, 1, 8, 8)

    session = onnxruntime.InferenceSession(onnx_from_network(Attention().eval(), (1, 8, 8)))
    sample = np.random.default_rng(0).normal(size=(3, 1, 8, 8)).astype(np.float32)
    found = session.run(None, {"sample": sample, "timestep": np.zeros(len(sample), np.float32)})[0]
    expected = Attention()(torch.tensor(sample), None).numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_group_norm_without_weights_is_exported_right():
    class Norm(nn.Module):
        def forward(self, sample, timestep):
            return nn.functional.group_norm(sample, 2, eps=1e-3)

    session = onnxruntime.InferenceSession(onnx_from_network(Norm().eval(), (4, 3, 3)))
    sample = np.random.default_rng(0).normal(2.0, 3.0, size=(2, 4, 3, 3)).astype(np.float32)
    groups = sample.astype(np.float64).reshape(2, 2, -1)
    centred = groups - groups.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-3)
    found = session.run(None, {"sample": sample, "timestep": np.zeros(len(sample), np.float32)})[0]
    assert np.abs(found.reshape(groups.shape) - expected).max() < 1e-6


def test_tiny_network_is_what_these_tests_think(network):
    """Dropout is there to be left in by mistake, and no layer is zero."""
    assert TINY.dropout > 0
    assert all(
        bool(p.any()) for n, p in network.named_parameters() if not re.search("norm.*bias", n)
    )
