"""export/ddpm_export/precision.py and precision_rules.py: what is lowered, what is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from precision_worlds import FLOAT, LOW, graph_bytes, kernel, parsed, run, small_unet, unet_inputs

from ddpm_export.precision import lower_precision, weight_losses
from ddpm_runtime.errors import ConfigurationError, ParityError

BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
KEPT = {
    "LayerNormalization",
    "InstanceNormalization",
    "GroupNormalization",
    "Softmax",
    "Sin",
    "Cos",
}
CONV = {"pads": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def lowered():
    return {p: lower_precision(small_unet().network_bytes, p) for p in ("fp16", "bf16")}


# --- the whole U-Net -----------------------------------------------------------------------------


@BOTH
def test_inputs_and_outputs_keep_their_names_types_and_shapes(lowered, precision):
    before, _, _ = parsed(small_unet().network_bytes)
    after, _, _ = parsed(lowered[precision])
    for part in ("input", "output"):
        assert list(getattr(after.graph, part)) == list(getattr(before.graph, part))


@BOTH
def test_the_result_passes_the_full_checker_and_bfloat16_has_its_opset(lowered, precision):
    model = onnx.load_model_from_string(lowered[precision])
    onnx.checker.check_model(model, full_check=True)
    opset = model.opset_import[0].version
    assert opset >= 22 if precision == "bf16" else opset == 18


@BOTH
def test_normalisation_softmax_and_time_embedding_stay_in_float32(lowered, precision):
    seen = set()
    model, types, _ = parsed(lowered[precision])
    for node in model.graph.node:
        if node.op_type in KEPT:
            seen.add(node.op_type)
            assert LOW[precision] not in {types[n] for n in (*node.input, *node.output) if n}
    assert {"Softmax", "Sin", "Cos"} < seen
    assert seen & {"LayerNormalization", "InstanceNormalization", "GroupNormalization"}


@BOTH
def test_the_first_and_the_last_convolution_alone_stay_in_float32(lowered, precision):
    model, types, _ = parsed(lowered[precision])
    single = [
        node
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and types[node.output[0]] == FLOAT
    ]
    assert [node.input[0] == "sample" for node in single] == [True, False]
    assert single[-1].output[0] == "prediction"


@BOTH
def test_all_other_layers_are_lowered_and_so_is_nearly_every_weight(lowered, precision):
    model, types, _ = parsed(lowered[precision])
    layers = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    low = [n for n in layers if {types[x] for x in n.input} == {LOW[precision]}]
    assert len(low) == len(layers) - 2
    values = {t.name: int(np.prod(t.dims)) for t in model.graph.initializer if "weight" in t.name}
    share = sum(n for name, n in values.items() if types[name] == LOW[precision])
    assert share > 0.95 * sum(values.values())


@BOTH
def test_no_cast_undoes_another_and_none_is_made_twice(lowered, precision):
    model, types, makers = parsed(lowered[precision])
    made = set()
    for node in model.graph.node:
        if node.op_type != "Cast":
            continue
        source, destination = node.input[0], node.output[0]
        assert types[source] != types[destination]
        above = makers.get(source)
        assert above is None or above.op_type != "Cast"
        assert (source, types[destination]) not in made
        made.add((source, types[destination]))


@BOTH
def test_every_cast_is_needed(lowered, precision):
    model, _, _ = parsed(lowered[precision])
    read = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    for node in model.graph.node:
        assert all(name in read for name in node.output), node.name
    constants = {tensor.name for tensor in model.graph.initializer}
    assert constants <= read
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    assert not [node for node in casts if node.input[0] in constants]


@BOTH
def test_parameters_keep_their_names(lowered, precision):
    model, _, _ = parsed(lowered[precision])
    names = {tensor.name for tensor in model.graph.initializer}
    before, _, _ = parsed(small_unet().network_bytes)
    assert {t.name for t in before.graph.initializer if t.name.endswith("weight")} <= names


@BOTH
def test_the_same_network_gives_the_same_bytes(lowered, precision):
    assert lower_precision(small_unet().network_bytes, precision) == lowered[precision]


def test_float32_is_left_alone():
    content = small_unet().network_bytes
    assert lower_precision(content, "fp32") is content


def test_fp16_runs_in_onnxruntime_and_answers_nearly_the_same(lowered):
    inputs = unet_inputs()
    expected = run(small_unet().network_bytes, **inputs)
    found = run(lowered["fp16"], **inputs)
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


# --- what is refused -----------------------------------------------------------------------------

THREE = [
    ("Conv", ["sample", "first.weight"], ["x"], CONV),
    ("Conv", ["x", "middle.weight"], ["y"], CONV),
    ("Conv", ["y", "last.weight"], ["prediction"], CONV),
]


def three(middle):
    return graph_bytes(
        THREE, {"first.weight": kernel(), "middle.weight": middle, "last.weight": kernel()}
    )


def test_a_weight_that_overflows_is_refused_by_the_name_of_its_layer():
    weights = kernel()
    weights[0, 0, 0, 0] = 7e4
    with pytest.raises(
        ParityError, match=r"1 of 36 values of 'middle.weight' \(Conv middle\)"
    ) as e:
        lower_precision(three(weights), "fp16")
    assert "--precision bf16 or fp32" in str(e.value)
    assert lower_precision(three(weights), "bf16")  # which holds it


def test_weights_outside_float16_are_reported_by_layer_the_worst_first():
    weights = kernel()
    weights[0, 0, 0] = 1e-6  # subnormal
    weights[0, 0, 1] = 1e-9  # zero
    (loss,) = weight_losses(three(weights), "fp16")
    assert (loss.layer, loss.name) == ("Conv middle", "middle.weight")
    assert (loss.overflowed, loss.subnormal, loss.flushed, loss.values) == (0, 6, 3, 36)
    assert loss.relative_error < 2**-11
    (loss,) = weight_losses(three(np.float32(1e-7) * kernel()), "fp16")
    assert loss.relative_error == 1.0  # all of it is lost
    assert loss.flushed == 36
    (loss,) = weight_losses(three(np.float32(1e-7) * kernel()), "bf16")
    assert loss.relative_error < 2**-8


def test_the_relative_error_of_ordinary_weights_is_that_of_rounding():
    # rounding to p digits: error uniform in ±2^−p of the leading binade, 2^−p/√12 to twice that
    for precision, digits in (("fp16", 11), ("bf16", 8)):
        errors = [
            loss.relative_error for loss in weight_losses(small_unet().network_bytes, precision)
        ]
        assert 2.0**-digits / 12**0.5 / 2 < np.median(errors) < 2.0**-digits


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"not a network", "cannot read the network"),
        (lambda: lower_precision(small_unet().network_bytes, "fp16"), "sixteen bits already"),
        (
            lambda: graph_bytes(
                [("Relu", ["image"], ["prediction"])], inputs={"image": (FLOAT, ["n", 1, 2, 2])}
            ),
            "must be called 'sample'",
        ),
    ],
)
def test_what_cannot_be_lowered_is_refused_with_the_remedy(make, words):
    with pytest.raises(ConfigurationError, match=words):
        lower_precision(make(), "fp16")


def test_control_flow_is_refused():
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["sample"], ["b"])],
        "branch",
        [],
        [onnx.helper.make_tensor_value_info("b", FLOAT, None)],
    )
    content = graph_bytes(
        [("If", ["yes"], ["prediction"], {"then_branch": branch, "else_branch": branch})],
        {"yes": np.array(True)},
    )
    with pytest.raises(ConfigurationError, match="straight graphs"):
        lower_precision(content, "fp16")


def test_an_unknown_precision_is_refused_with_the_possible_ones():
    with pytest.raises(ConfigurationError, match="bf16, fp16, fp32"):
        lower_precision(small_unet().network_bytes, "fp8")


# --- any straight network ------------------------------------------------------------------------

UNARY = ["Relu", "Sigmoid", "Softmax", "Identity", "Sqrt", "Exp", "Neg", "Tanh", "Transpose"]
BINARY = ["Add", "Mul", "Sub", "Max", "Concat"]


@st.composite
def networks(draw):
    """Layers and operators of every kind in any order; every tensor is (n, 2, 4, 4)."""
    nodes, constants, tensors = [], {}, ["sample"]
    for step in range(draw(st.integers(2, 8))):
        name = f"t{step}"
        kind = draw(st.sampled_from(["conv", "unary", "binary", "constant"]))
        one, other = (draw(st.sampled_from(tensors)) for _ in range(2))
        if kind == "conv":
            constants[f"l{step}.weight"] = kernel(draw(st.sampled_from([0.1, -0.05, 0.3])))
            nodes.append(("Conv", [one, f"l{step}.weight"], [name], CONV))
        elif kind == "unary":
            operator = draw(st.sampled_from(UNARY))
            if operator == "Sqrt":
                nodes.append(("Abs", [one], [f"{name}a"]))
                one = f"{name}a"
            attributes = {"perm": [0, 1, 3, 2]} if operator == "Transpose" else {}
            nodes.append((operator, [one], [name], attributes))
        elif kind == "binary":
            operator = draw(st.sampled_from(BINARY))
            if operator == "Concat":
                nodes.append(("Concat", [one, other], [f"{name}c"], {"axis": 1}))
                constants[f"l{step}.weight"] = kernel(0.1, channels=4)
                nodes.append(("Conv", [f"{name}c", f"l{step}.weight"], [name], CONV))
            else:
                nodes.append((operator, [one, other], [name]))
        else:
            constants[f"c{step}"] = np.float32(draw(st.sampled_from([0.5, -2.0, 1e-3])))
            nodes.append(("Mul", [one, f"c{step}"], [name]))
        tensors.append(name)
    nodes.append(("Identity", [tensors[-1]], ["prediction"]))
    return graph_bytes(nodes, constants)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks())
def test_any_straight_network_is_lowered_to_one_that_checks_and_answers_nearly_the_same(content):
    from ddpm_export.precision_emulation import emulated

    sample = np.random.default_rng(0).standard_normal((2, 2, 4, 4)).astype(np.float32)
    expected = run(content, sample=sample)
    for precision, tolerance in (("fp16", 2e-2), ("bf16", 1.6e-1)):
        low = lower_precision(content, precision)  # checks it
        model, types, _ = parsed(low)
        casts = [node for node in model.graph.node if node.op_type == "Cast"]
        assert all(types[node.input[0]] != types[node.output[0]] for node in casts)
        found = run(emulated(low), sample=sample)
        scale = np.abs(expected).max() + 1.0
        if np.isfinite(expected).all() and scale < 1e3:
            assert np.abs(found - expected).max() < tolerance * scale
