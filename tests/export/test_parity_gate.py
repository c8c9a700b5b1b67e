"""The gate passes what is right and catches every planted error, saying where."""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny_export import TINY, bundle_of
from torch import nn

from ddpm_export.parity import measure_parity
from ddpm_export.probes import probe_labels, probes
from ddpm_runtime.errors import NetworkMismatchError, ParityError
from ddpm_train.unet import UNet


def with_initializer(network_bytes: bytes, name: str, change) -> bytes:
    """The ONNX file with one of its constants changed."""
    model = onnx.load_model_from_string(network_bytes)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model.SerializeToString()


def scaled(factor: float):
    return lambda values: values * np.float32(factor)


def set_first(values: np.ndarray, value: float) -> np.ndarray:
    values.flat[0] = value
    return values


def measure(network, network_bytes, **options):
    return measure_parity(network, bundle_of(network_bytes), threads=1, **options)


def refused(network, network_bytes, match: str) -> str:
    report = measure(network, network_bytes)
    assert not report.passed
    with pytest.raises(ParityError, match=match) as error:
        report.require()
    assert "Nothing was written" in str(error.value)
    assert "FAILED" in str(report)
    return str(error.value)


def test_the_exported_network_passes_far_below_the_limits(network, network_bytes):
    report = measure(network, network_bytes)
    report.require()
    # float32 has 24 bits; a dozen layers of rounding stay within a factor of ten of 2^-24
    assert report.worst.relative_error < 1e-6
    assert report.sampled.max_abs_difference < 1e-4
    assert report.sampled.within_one_level == 1.0
    assert report.rows_identical


def test_the_whole_range_of_timesteps_and_all_classes_are_visited(network, network_bytes):
    report = measure(network, network_bytes)
    timesteps = [evaluation.timestep for evaluation in report.evaluations]
    assert len(timesteps) >= 8
    assert (max(timesteps), min(timesteps)) == (199, 0)
    assert any(t != round(t) for t in timesteps)
    assert report.labels == (0, 1, 2, 3)  # 3 is "no class"
    assert (report.sampled.steps, report.batch_size) == (10, 4)


def test_the_relative_error_is_that_of_the_worst_row_against_float64(network, network_bytes):
    # one row of one class is off by 1 %: the norm over a whole batch would dilute it
    factors = np.float32([[1], [1], [1.01], [1]])
    changed = with_initializer(network_bytes, "label_embedding.weight", lambda w: w * factors)
    report = measure(network, changed)
    (probe,) = (p for p in probes(bundle_of(changed), 4) if p.timestep == report.worst.timestep)
    double, altered = copy.deepcopy(network).double(), copy.deepcopy(network).double()
    with torch.no_grad():
        altered.label_embedding.weight[2] *= 1.01
        sample = torch.tensor(probe.sample, dtype=torch.float64)
        inputs = sample, torch.tensor(probe.timesteps), torch.tensor(probe.label)
        right, wrong = double(*inputs), altered(*inputs)
    expected = ((wrong - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1)).max()
    assert report.worst.relative_error == pytest.approx(float(expected), rel=1e-3)


def test_perturbed_weights_are_caught(network, network_bytes):
    changed = with_initializer(network_bytes, "conv_out.weight", scaled(1.0001))
    message = refused(network, changed, match=r"relative error \d\.\d\de-0[45] at timestep \d+")
    assert "1e-05 is allowed" in message


def test_a_wrong_attention_scale_in_the_graph_is_caught(network, network_bytes):
    model = onnx.load_model_from_string(network_bytes)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    # 1/√16, shared by every attention
    (name,) = (n for n, v in constants.items() if v.shape == () and v == np.float32(0.25))
    changed = with_initializer(network_bytes, name, scaled(1.02))
    refused(network, changed, match="relative error")


def test_a_wrong_epsilon_in_the_graph_is_caught(network, network_bytes):
    model = onnx.load_model_from_string(network_bytes)
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization":
            (epsilon,) = (a for a in node.attribute if a.name == "epsilon")
            epsilon.f = 1e-3
    refused(network, model.SerializeToString(), match="relative error")


class Wrapped(nn.Module):
    """A network called with changed arguments. As the reference it plants an error just as well
    as in the exported graph, and needs no export."""

    def __init__(self, network: UNet, change) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, sample, timestep, label):
        return self.network(*self.change(sample, timestep, label))


PLANTED = {
    "timestep off by one": lambda x, t, y: (x, t + 1.0, y),
    "timestep cut to a whole number": lambda x, t, y: (x, t.floor(), y),
    "timestep counted backwards": lambda x, t, y: (x, 199.0 - t, y),
    "label ignored": lambda x, t, y: (x, t, y * 0),
    "no class taken for the last class": lambda x, t, y: (x, t, y.clamp(max=2)),
    "sample scaled": lambda x, t, y: (x * 1.001, t, y),
    "sample clipped": lambda x, t, y: (x.clamp(-1.0, 1.0), t, y),
    "sample rounded to bfloat16": lambda x, t, y: (x.bfloat16().to(x.dtype), t, y),
    "image mirrored": lambda x, t, y: (x.flip(-1), t, y),
    "rows mixed": lambda x, t, y: (x - 1e-3 * x.mean(dim=0, keepdim=True), t, y),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_error_is_caught(network, network_bytes, planted):
    refused(Wrapped(network, PLANTED[planted]), network_bytes, match="relative error")


def test_only_the_fraction_betrays_a_timestep_cut_to_a_whole_number(network, network_bytes):
    report = measure(Wrapped(network, PLANTED["timestep cut to a whole number"]), network_bytes)
    bad = [e.timestep for e in report.evaluations if e.relative_error > report.tolerance]
    assert bad == [100.5]


def test_a_graph_whose_rows_depend_on_their_batch_is_refused(network, network_bytes):
    model = onnx.load_model_from_string(network_bytes)
    for node in model.graph.node:
        node.input[:] = ["mixed" if name == "sample" else name for name in node.input]
    mean = helper.make_node("ReduceMean", ["sample", "batch_axis"], ["mean"], keepdims=1)
    less = helper.make_node("Mul", ["mean", "little"], ["less"])
    mixed = helper.make_node("Add", ["sample", "less"], ["mixed"])
    for node in (mixed, less, mean):
        model.graph.node.insert(0, node)
    constants = {"batch_axis": np.array([0]), "little": np.float32([1e-3])}
    model.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in constants.items())
    refused(network, model.SerializeToString(), match="relative error")
    report = measure(network, model.SerializeToString())
    assert not report.rows_identical
    assert "DIFFERENT BITS" in str(report)


def test_a_network_compared_in_training_mode_is_caught(network, network_bytes):
    """Dropout on one side only: what an export in training mode amounts to."""
    training = copy.deepcopy(network).train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        refused(training, network_bytes, match="relative error")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(network, network_bytes, value):
    name = "down.0.residual.conv1.weight"
    changed = with_initializer(network_bytes, name, lambda w: set_first(w, value))
    with pytest.raises(ParityError, match=name.replace(".", r"\.")):
        measure(network, changed)


def with_last_layer_scaled(network, network_bytes, factor):
    """The same change in PyTorch and in the ONNX file: they agree."""
    changed = copy.deepcopy(network)
    with torch.no_grad():
        changed.conv_out.weight *= factor
        changed.conv_out.bias *= factor
    for name in ("conv_out.weight", "conv_out.bias"):
        network_bytes = with_initializer(network_bytes, name, scaled(factor))
    return changed, network_bytes


def test_an_overflow_inside_the_network_is_found(network, network_bytes):
    huge = with_last_layer_scaled(network, network_bytes, 3e38)
    refused(*huge, match="NaN or infinity at timestep")


def test_an_untrained_network_that_answers_zero_is_refused_honestly(network, network_bytes):
    assert not UNet(TINY).conv_out.weight.any()  # as every training starts
    untrained = with_last_layer_scaled(network, network_bytes, 0.0)
    refused(*untrained, match=r"exactly zero.*train it first")


def test_an_error_that_shows_only_along_the_trajectory_is_refused(network, network_bytes):
    """Guidance and the loop are part of the gate, not only single answers."""
    report = measure(network, network_bytes)
    for broken in (
        {"max_abs_difference": 2e-3},
        {"max_abs_difference": float("nan")},
        {"within_one_level": 0.998},
        {"finite": False},
    ):
        sampled = dataclasses.replace(report.sampled, **broken)
        changed = dataclasses.replace(report, sampled=sampled)
        with pytest.raises(ParityError, match="steps"):
            changed.require()


def test_a_graph_with_other_inputs_than_the_manifest_is_refused(network, network_bytes):
    with pytest.raises(NetworkMismatchError, match="describes inputs"):
        measure_parity(network, bundle_of(network_bytes, num_classes=0), threads=1)


def test_the_report_is_plain_json_and_readable(network, network_bytes):
    report = measure(network, network_bytes)
    values = report.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["passed"] is True
    assert len(values["evaluations"]) == len(report.evaluations)
    lines = str(report).splitlines()
    assert lines[0].split()[0] == "timestep"
    assert lines[-1] == "parity: passed"


def test_measuring_leaves_the_network_and_torch_as_they_were(network, network_bytes):
    before = copy.deepcopy(network.state_dict())
    threads = torch.get_num_threads()
    measure(network, network_bytes)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.get_num_threads() == threads


# --- the probes ----------------------------------------------------------------------------------


def test_probes_are_noisy_images_of_the_right_level_and_pure_noise(network_bytes):
    bundle = bundle_of(network_bytes)
    made = probes(bundle, 4)
    alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 200))  # DDPM's betas, eq. 4
    for probe in made:
        if probe.timestep == round(probe.timestep):
            noise_variance = 1.0 - alphas_cumprod[int(probe.timestep)]
            # pixels of x_0 lie in [-1, 1] and vary slowly; of noise, independently
            rough = np.diff(probe.sample[:-1], axis=-1).var() / 2
            assert rough == pytest.approx(noise_variance, abs=0.35 * noise_variance + 0.1)
        assert probe.sample[-1].std() == pytest.approx(1.0, abs=0.35)  # 64 values
    assert np.abs(made[-2].sample[:-1]).max() <= 1.05  # timestep 0: nearly the clean image


def test_probes_are_the_same_every_time(network_bytes):
    first, second = (probes(bundle_of(network_bytes), 3) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.timestep == other.timestep
        assert one.sample.tobytes() == other.sample.tobytes()
        assert (one.label == other.label).all()


@pytest.mark.parametrize(
    ("num_classes", "expected"),
    [(0, [0]), (1, [1, 0]), (3, [3, 0, 1, 2]), (1000, [1000, 0, 499, 999])],
)
def test_labels_begin_with_no_class_and_spread_over_the_others(num_classes, expected):
    assert probe_labels(num_classes, 4) == expected
