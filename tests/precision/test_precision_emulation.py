"""export/ddpm_export/precision_emulation.py: rounding, against two outside oracles."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from precision_worlds import graph_bytes, run, small_unet, unet_inputs

from ddpm_export.precision import lower_precision
from ddpm_export.precision_emulation import activation_peaks, emulated
from ddpm_runtime.errors import BackendError

BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
CONV = {"pads": [1, 1, 1, 1]}
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
IDENTITY = np.zeros((2, 2, 3, 3), np.float32)
IDENTITY[[0, 1], [0, 1], 1, 1] = 1.0


def pointwise_network():
    """Pointwise operators between two layers that change nothing: each rounding can be followed."""
    return graph_bytes(
        [
            ("Conv", ["sample", "in.weight"], ["x"], CONV),
            ("Conv", ["x", "mid.weight"], ["y"], CONV),
            ("Mul", ["y", "third"], ["z"]),
            ("Add", ["z", "y"], ["w"]),
            ("Sub", ["w", "tenth"], ["v"]),
            ("Conv", ["v", "out.weight"], ["prediction"], CONV),
        ],
        {
            **dict.fromkeys(("in.weight", "mid.weight", "out.weight"), IDENTITY),
            "third": np.float32(1 / 3),
            "tenth": np.float32(0.1),
        },
    )


@BOTH
def test_rounding_is_numpys_value_by_value(precision):
    kind = NUMPY[precision]

    def low(values):
        return np.asarray(values, np.float32).astype(kind).astype(np.float32)

    rng = np.random.default_rng(0)
    sample = rng.standard_normal((64, 2, 4, 4)).astype(np.float32)
    sample *= np.float32(10.0) ** rng.integers(-6, 4, sample.shape).astype(np.float32)
    y = low(sample)
    z = low(y * low(np.float32(1 / 3)))
    expected = low(low(z + y) - low(np.float32(0.1)))
    found = run(emulated(lower_precision(pointwise_network(), precision)), sample=sample)
    assert found.tobytes() == expected.tobytes()


@BOTH
def test_ties_go_to_even_and_overflow_to_infinity(precision):
    digits = {"fp16": 11, "bf16": 8}[precision]
    step = np.float32(2.0 ** (1 - digits))
    one = np.float32(1.0)
    halves = [one + step / 2, one + 3 * step / 2, one + step / 2 + step / 64]
    expected = [one, one + 2 * step, one + step]
    network = graph_bytes(
        [
            ("Conv", ["sample", "in.weight"], ["x"], CONV),
            ("Conv", ["x", "mid.weight"], ["y"], CONV),
            ("Conv", ["y", "out.weight"], ["prediction"], CONV),
        ],
        dict.fromkeys(("in.weight", "mid.weight", "out.weight"), IDENTITY),
    )
    content = emulated(lower_precision(network, precision))
    for value, rounded in zip(halves, expected, strict=True):
        sample = np.zeros((1, 2, 4, 4), np.float32)
        sample[0, 0, 1, 1] = value
        assert run(content, sample=sample)[0, 0, 1, 1] == rounded
    sample[0, 0, 1, 1] = 65520.0
    assert np.isfinite(run(content, sample=sample)).all() == (precision == "bf16")


@BOTH
def test_the_onnx_reference_evaluator_agrees_on_a_whole_unet(precision):
    """It computes in the low type itself, so it rounds sums too: it is near, not equal."""
    content = lower_precision(small_unet().network_bytes, precision)
    inputs = unet_inputs(rows=1)
    expected = run(small_unet().network_bytes, **inputs)
    found = run(emulated(content), **inputs)
    (reference,) = ReferenceEvaluator(onnx.load_model_from_string(content)).run(None, inputs)
    error = np.linalg.norm(found - expected)
    outside = np.linalg.norm(reference - expected)
    assert reference.dtype == np.float32
    assert 0.2 < error / outside < 2.0


def test_onnxruntimes_own_float16_is_as_far_away_or_nearer():
    content = lower_precision(small_unet().network_bytes, "fp16")
    inputs = unet_inputs()
    expected = run(small_unet().network_bytes, **inputs)
    own = np.linalg.norm(run(content, **inputs) - expected)
    emulation = np.linalg.norm(run(emulated(content), **inputs) - expected)
    assert 0.3 * emulation < own < 1.1 * emulation


@pytest.mark.parametrize("operator", ["Conv", "Gemm", "MatMul", "Add", "Mul", "Resize"])
def test_onnxruntime_on_the_cpu_still_has_no_bfloat16_for_layers(operator):
    """Why there is an emulation. Where this fails, bfloat16 can be measured directly: do."""
    shapes = {
        "Conv": ([1, 2, 4, 4], [2, 2, 3, 3]),
        "Gemm": ([2, 2], [2, 2]),
        "MatMul": ([2, 2], [2, 2]),
        "Add": ([2], [2]),
        "Mul": ([2], [2]),
        "Resize": ([1, 2, 4, 4], None),
    }
    one, other = shapes[operator]
    names = ["a", "b"] if other else ["a", "", "scales"]
    inputs = [helper.make_tensor_value_info("a", TensorProto.BFLOAT16, one)]
    if other:
        inputs.append(helper.make_tensor_value_info("b", TensorProto.BFLOAT16, other))
    scales = onnx.numpy_helper.from_array(np.float32([1, 1, 2, 2]), "scales")
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["c"])],
        "one",
        inputs,
        [helper.make_tensor_value_info("c", TensorProto.BFLOAT16, None)],
        [] if other else [scales],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


def overflowing_network():
    """Behind "grow", 3 · 10⁴ times the image; "sum" adds it to itself."""
    return graph_bytes(
        [
            ("Conv", ["sample", "first.weight"], ["x"], CONV),
            ("Conv", ["x", "grow.weight"], ["y"], CONV),
            ("Add", ["y", "y"], ["doubled"]),
            ("Add", ["doubled", "y"], ["tripled"]),
            ("Conv", ["tripled", "last.weight"], ["prediction"], CONV),
        ],
        {
            "first.weight": IDENTITY,
            "grow.weight": np.float32(3e4) * IDENTITY,
            "last.weight": IDENTITY,
        },
    )


def peaks(precision, value):
    sample = np.full((1, 2, 4, 4), value, np.float32)
    content = lower_precision(overflowing_network(), precision)
    return activation_peaks(content, [{"sample": np.zeros_like(sample)}, {"sample": sample}])


def test_an_activation_that_overflows_is_located_at_the_layer_where_it_starts():
    first = next(peak for peak in peaks("fp16", 0.8) if peak.overflows)
    assert first.tensor == "tripled"
    assert first.layer == "Add after grow"
    assert first.peak == pytest.approx(7.2e4, rel=1e-3)
    assert "reaches 7.2e+04; the type holds 65504" in str(first)
    first = next(peak for peak in peaks("fp16", 3.0) if peak.overflows)
    assert (first.tensor, first.layer) == ("y", "Conv grow")


def test_the_same_activations_do_not_overflow_bfloat16():
    assert not any(peak.overflows for peak in peaks("bf16", 100.0))


def test_peaks_come_in_the_order_in_which_they_are_made():
    assert [peak.tensor for peak in peaks("fp16", 0.1)] == ["x_fp16", "y", "doubled", "tripled"]


def test_a_network_that_is_not_finite_in_float32_either_counts_as_overflow():
    assert any(peak.overflows for peak in peaks("bf16", np.nan))


def test_inputs_that_do_not_fit_are_an_error():
    content = lower_precision(overflowing_network(), "fp16")
    with pytest.raises(BackendError, match="cannot run the emulated network"):
        activation_peaks(content, [{"wrong": np.zeros(1, np.float32)}])
