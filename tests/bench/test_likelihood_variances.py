"""The bound with another variance: fixed_large, and those a network learned.

Source of what is expected: Nichol & Dhariwal, arXiv 2102.09672 eq. 15 and §3.1, in the world of
``gaussian_pixels``.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from gaussian_pixels import (
    DEVIATION,
    SCHEDULE,
    chain,
    gaussian_images,
    gaussian_network,
    hand_made_betas,
    oracle,
    posterior_variance,
)

from ddpm_bench.cli import bench
from ddpm_bench.likelihood import variational_bound
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.errors import ConfigurationError
from helpers.analytic import gaussian_epsilon


def learned_network(v_at) -> FunctionBackend:
    """The exact Gaussian network, with ``v_at(t)`` for its second half of channels."""
    epsilon = gaussian_epsilon(SCHEDULE, deviation=DEVIATION)

    def network(sample, timestep, label):
        v = np.stack([np.broadcast_to(v_at(int(t)), (1, 8, 8)) for t in timestep])
        return np.concatenate([epsilon(sample, timestep, label), v], axis=1)

    return FunctionBackend(network, (1, 8, 8), prediction_channels=2)


def test_the_large_variance_has_its_own_closed_form():
    program = chain(variance="fixed_large")
    bound = variational_bound(gaussian_network(), program, gaussian_images(400, seed=11))
    prior, terms, decoder = oracle(lambda t: hand_made_betas()[t])
    # 25,600 pixels: √(2/25,600) = 0.9 % of a mean of squares
    np.testing.assert_allclose(bound.terms[:-1], terms, rtol=0.05)
    assert bound.terms[-1] == pytest.approx(decoder, abs=0.03)
    assert bound.prior == pytest.approx(prior, abs=5e-3)


@pytest.mark.parametrize(("v", "fixed"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_the_ends_of_the_learned_range_are_the_fixed_variances(v, fixed):
    images = gaussian_images(8, seed=12)
    found = variational_bound(learned_network(lambda t: v), chain(variance="learned_range"), images)
    expected = variational_bound(gaussian_network(), chain(variance=fixed), images)
    np.testing.assert_allclose(found.terms[:-1], expected.terms[:-1], rtol=1e-9)
    if fixed == "fixed_small":
        assert found.terms[-1] == pytest.approx(expected.terms[-1], rel=1e-9)
    # fixed_large keeps the small variance for its decoder, as Ho et al. do; the range has β there


def test_variances_between_are_learned_pixel_by_pixel():
    """Half of the pixels have u = 0.2 and half 0.9 of the way from log β̃ to log β."""
    shares = np.where(np.arange(8) % 2, 0.9, 0.2)
    network = learned_network(lambda t: 2 * shares - 1)
    program = chain(variance="learned_range")
    bound = variational_bound(network, program, gaussian_images(400, seed=13))
    betas = hand_made_betas()
    parts = [
        oracle(
            lambda t, u=u: betas[t] ** u * posterior_variance(t) ** (1 - u),
            decoder_variance=betas[0] ** u * posterior_variance(1) ** (1 - u),
        )
        for u in (0.2, 0.9)
    ]
    np.testing.assert_allclose(bound.terms[:-1], (parts[0][1] + parts[1][1]) / 2, rtol=0.05)
    assert bound.terms[-1] == pytest.approx((parts[0][2] + parts[1][2]) / 2, abs=0.03)


def test_a_learned_logarithm_is_the_variance_itself():
    """variance=learned: v = log σ²; here 1.7 times β̃ everywhere, and β̃ of t = 1 at the decoder."""
    network = learned_network(lambda t: math.log(1.7 * posterior_variance(max(t, 1))))
    program = chain(variance="learned")
    bound = variational_bound(network, program, gaussian_images(400, seed=14))
    _, terms, decoder = oracle(
        lambda t: 1.7 * posterior_variance(t), decoder_variance=1.7 * posterior_variance(1)
    )
    np.testing.assert_allclose(bound.terms[:-1], terms, rtol=0.05)
    assert bound.terms[-1] == pytest.approx(decoder, abs=0.03)


def test_the_best_variance_needs_fewer_bits_than_either_end():
    """The step's mean misses by more than β̃ alone: the best σ² is β̃ plus that miss."""
    betas, data = hand_made_betas(), DEVIATION**2

    def best(t):
        if t == 0:
            return -1.0
        alpha_bar = math.prod(1 - beta for beta in betas[: t + 1])
        before = alpha_bar / (1 - betas[t])
        from_x0 = math.sqrt(before) * betas[t] / (1 - alpha_bar)
        missed = from_x0**2 * data * (1 - alpha_bar) / (alpha_bar * data + 1 - alpha_bar)
        low, high = math.log(posterior_variance(t)), math.log(betas[t])
        return 2 * (math.log(posterior_variance(t) + missed) - low) / (high - low) - 1

    images = gaussian_images(64, seed=15)
    program = chain(variance="learned_range")
    chosen, small, large = (
        variational_bound(learned_network(v_at), program, images).terms[:-1].sum()
        for v_at in (best, lambda t: -1.0, lambda t: 1.0)
    )
    assert chosen < min(small, large) - 0.01


def test_a_fixed_variance_ignores_the_one_a_network_learned():
    images = gaussian_images(3, seed=16)
    found = variational_bound(learned_network(lambda t: 0.4), chain(), images)
    expected = variational_bound(gaussian_network(), chain(), images)
    np.testing.assert_allclose(found.per_image, expected.per_image, rtol=1e-12)


@pytest.fixture
def learned_engine_path(tmp_path):
    """An engine whose second channel is its variance: the first one again."""
    import onnx

    from ddpm_runtime.bundle import Defaults, Image, Manifest, Network, write_bundle
    from helpers.tiny_engine import tiny_network_bytes

    model = onnx.load_model_from_string(tiny_network_bytes(num_classes=0))
    last, (output,) = model.graph.node[-1], model.graph.output
    twice = onnx.helper.make_node("Concat", [*last.input] * 2, ["prediction"], axis=1)
    last.CopyFrom(twice)
    output.type.tensor_type.shape.dim[1].dim_value = 2
    manifest = Manifest(
        name="learned",
        image=Image(height=8, width=8, channels=1),
        network=Network(prediction_type="epsilon", learned_variance=True, opset=18),
        schedule={"name": "linear", "num_train_timesteps": 20},
        defaults=Defaults(steps=4),
    )
    write_bundle(tmp_path / "learned.engine", manifest, model.SerializeToString())
    return tmp_path / "learned.engine"


def test_the_command_bounds_a_learned_variance_unless_told_otherwise(learned_engine_path, tmp_path):
    np.savez(tmp_path / "images.npz", images=gaussian_images(4, seed=17))
    words = [
        "--engine",
        str(learned_engine_path),
        "--data",
        str(tmp_path / "images.npz"),
        "-n",
        "4",
    ]
    bits = {}
    for asked in (None, "learned_range", "fixed_small", "fixed_large", "learned"):
        more = [] if asked is None else ["--variance", asked]
        path = tmp_path / f"{asked}.json"
        done = CliRunner().invoke(bench, ["likelihood", *words, *more, "--json", str(path)])
        assert done.exit_code == 0, done.output
        report = json.loads(path.read_text())
        assert report["variance"] == (asked or "learned_range")
        assert f"variance {report['variance']}" in done.output
        bits[asked] = report["cases"][0]["bits_per_dimension"]
    assert bits[None] == bits["learned_range"]
    assert len(set(bits.values())) == 4


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_a_network_without_a_variance_cannot_have_learned_one(variance):
    program = chain(variance=variance)
    with pytest.raises(
        ConfigurationError, match=r"predicts 2 channels.*this one predicts 1.*fixed"
    ):
        variational_bound(gaussian_network(), program, gaussian_images(1, seed=0))
