"""export/ddpm_export/precision_rules.py, one rule at a time, on networks made by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from precision_worlds import FLOAT, LOW, graph_bytes, kernel, parsed

from ddpm_export.precision import lower_precision

BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
CONV = {"pads": [1, 1, 1, 1]}


def types_read(content, operator):
    """The types that nodes of one operator read, and write, for every such node."""
    model, types, _ = parsed(content)
    return [
        {types[name] for name in (*node.input, *node.output) if name}
        for node in model.graph.node
        if node.op_type == operator
    ]


@BOTH
def test_resize_scales_stay_in_float32_and_its_image_where_libraries_have_no_kernel(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "a2"], ["y"], CONV),
            ("Resize", ["y", "", "scales"], ["z"], {"mode": "nearest"}),
            ("Conv", ["z", "b"], ["prediction"], CONV),
        ],
        {"a": kernel(), "a2": kernel(), "b": kernel(), "scales": np.float32([1, 1, 2, 2])},
    )
    model, types, _ = parsed(lower_precision(content, precision))
    (resize,) = [node for node in model.graph.node if node.op_type == "Resize"]
    assert types[resize.input[0]] == (FLOAT if precision == "bf16" else LOW["fp16"])
    assert types[resize.input[2]] == FLOAT


@BOTH
def test_a_decomposed_normalisation_stays_in_float32_as_a_whole(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["first"], CONV),
            ("Conv", ["first", "b"], ["x"], CONV),
            ("ReduceMean", ["x", "axes"], ["mean"]),
            ("Sub", ["x", "mean"], ["centred"]),
            ("Mul", ["centred", "centred"], ["squared"]),
            ("ReduceMean", ["squared", "axes"], ["variance"]),
            ("Add", ["variance", "epsilon"], ["safe"]),
            ("Sqrt", ["safe"], ["deviation"]),
            ("Div", ["centred", "deviation"], ["normed"]),
            ("Conv", ["normed", "c"], ["y"], CONV),
            ("Conv", ["y", "d"], ["prediction"], CONV),
        ],
        {
            **{name: kernel() for name in "abcd"},
            "axes": np.array([1, 2, 3]),
            "epsilon": np.float32(1e-6),
        },
    )
    low = lower_precision(content, precision)
    for operator in ("ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div"):
        assert all(LOW[precision] not in types for types in types_read(low, operator)), operator
    layers = types_read(low, "Conv")
    assert [LOW[precision] in types for types in layers] == [False, True, True, False]


@BOTH
def test_a_number_that_was_an_integer_stays_in_float32(precision):
    content = graph_bytes(
        [
            ("Cast", ["timestep"], ["t"], {"to": FLOAT}),
            ("Unsqueeze", ["t", "one"], ["column"]),
            ("Mul", ["column", "frequencies"], ["angles"]),
            ("Sin", ["angles"], ["wave"]),
            ("MatMul", ["wave", "w"], ["embedding"]),
            ("Unsqueeze", ["embedding", "axes"], ["wide"]),
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Add", ["x", "wide"], ["y"]),
            ("Conv", ["y", "b"], ["prediction"], CONV),
        ],
        {
            "one": np.array([1]),
            "axes": np.array([2, 3]),
            "frequencies": np.float32([1, 0.1]),
            "w": np.eye(2, dtype=np.float32),
            "a": kernel(),
            "b": kernel(),
        },
        inputs={
            "sample": (FLOAT, ["n", 2, 4, 4]),
            "timestep": (onnx.TensorProto.INT64, ["n"]),
        },
    )
    low = lower_precision(content, precision)
    _, types, _ = parsed(low)
    for name in ("t", "column", "angles", "wave"):
        assert types[name] == FLOAT
    assert types["embedding"] == LOW[precision]


@BOTH
def test_shapes_are_read_without_a_cast_and_constant_nodes_become_constants(precision):
    value = onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.float32([0.5])))
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("Shape", ["y"], ["shape"]),
            ("Constant", [], ["half"], {"value": onnx.helper.get_attribute_value(value)}),
            ("Mul", ["y", "half"], ["z"]),
            ("Reshape", ["z", "shape"], ["same"]),
            ("Conv", ["same", "c"], ["prediction"], CONV),
        ],
        {name: kernel() for name in "abc"},
    )
    model, types, _ = parsed(lower_precision(content, precision))
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("Cast") == 2  # behind the first layer, before the last
    assert "Constant" not in operators
    assert types["half"] == LOW[precision]


@BOTH
def test_a_constant_that_both_sides_read_is_there_in_both_types(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "shared"], ["x"], CONV),
            ("Conv", ["x", "shared"], ["y"], CONV),
            ("Conv", ["y", "c"], ["prediction"], CONV),
        ],
        {"shared": kernel(), "c": kernel()},
    )
    _, types, _ = parsed(lower_precision(content, precision))
    assert types["shared"] == FLOAT
    assert types[f"shared_{precision}"] == LOW[precision]


@BOTH
def test_every_output_is_made_in_float32(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("Relu", ["y"], ["features"]),
            ("Conv", ["features", "c"], ["z"], CONV),
            ("Conv", ["z", "d"], ["prediction"], CONV),
        ],
        {name: kernel() for name in "abcd"},
        outputs={name: (FLOAT, ["n", 2, 4, 4]) for name in ("prediction", "features")},
    )
    _, types, makers = parsed(lower_precision(content, precision))
    assert makers["features"].op_type == "Relu"
    assert [types[name] for name in ("prediction", "features", "y")] == [FLOAT] * 3
    assert types["z"] == LOW[precision]


@BOTH
def test_what_follows_the_last_layer_stays_in_float32(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("Conv", ["y", "c"], ["out"], CONV),
            ("Mul", ["out", "scale"], ["scaled"]),
            ("Add", ["scaled", "sample"], ["prediction"]),
        ],
        {**{name: kernel() for name in "abc"}, "scale": np.float32(0.5)},
    )
    _, types, _ = parsed(lower_precision(content, precision))
    assert [types[name] for name in ("out", "scaled", "prediction")] == [FLOAT] * 3
    assert types["y"] == LOW[precision]


@BOTH
def test_an_empty_cast_of_the_source_is_left_out(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("Cast", ["y"], ["same"], {"to": FLOAT}),
            ("Sigmoid", ["same"], ["z"]),
            ("Conv", ["z", "c"], ["prediction"], CONV),
        ],
        {name: kernel() for name in "abc"},
    )
    model, _, makers = parsed(lower_precision(content, precision))
    assert [node.op_type for node in model.graph.node].count("Cast") == 2
    assert makers["z"].input[0] == "y"


def test_an_operator_this_file_does_not_know_stays_in_float32():
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("CumSum", ["y", "axis"], ["z"]),
            ("Conv", ["z", "c"], ["prediction"], CONV),
        ],
        {**{name: kernel() for name in "abc"}, "axis": np.array(2)},
    )
    (types,) = types_read(lower_precision(content, "fp16"), "CumSum")
    assert LOW["fp16"] not in types


@BOTH
def test_what_the_first_layer_makes_is_lowered_like_any_layers(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Conv", ["x", "b"], ["y"], CONV),
            ("Add", ["x", "y"], ["residual"]),
            ("Conv", ["residual", "c"], ["prediction"], CONV),
        ],
        {name: kernel() for name in "abc"},
    )
    _, types, _ = parsed(lower_precision(content, precision))
    assert types["x"] == FLOAT
    assert types["residual"] == LOW[precision]


@BOTH
def test_the_shape_of_a_float32_tensor_is_read_without_a_cast(precision):
    content = graph_bytes(
        [
            ("Conv", ["sample", "a"], ["x"], CONV),
            ("Shape", ["x"], ["shape"]),
            ("LpNormalization", ["x"], ["normed"]),
            ("Reshape", ["normed", "shape"], ["same"]),
            ("Conv", ["same", "b"], ["prediction"], CONV),
        ],
        {name: kernel() for name in "ab"},
    )
    model, _, _ = parsed(lower_precision(content, precision))
    assert "Cast" not in [node.op_type for node in model.graph.node]
