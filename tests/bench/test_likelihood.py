"""ddpm_bench/likelihood.py in the world of ``gaussian_pixels``, where every term is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from gaussian_pixels import (
    DEVIATION,
    SCHEDULE,
    SHAPE,
    T,
    chain,
    gaussian_images,
    gaussian_network,
    levels_and_probabilities,
    log_mass,
    oracle,
)

from ddpm_bench.likelihood import log_interval_probability, variational_bound
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.samplers import build_program
from helpers.analytic import gaussian_epsilon


@pytest.fixture(scope="module")
def large_bound():
    """Over 512,000 pixels."""
    network = gaussian_network(16)
    images = gaussian_images(2000, seed=0, shape=(16, 16, 1))
    return variational_bound(network, chain(), images, batch_size=256)


def test_a_gaussian_network_has_the_closed_form_within_a_hundredth_of_a_bit(large_bound):
    prior, terms, decoder = oracle()
    assert large_bound.standard_error < 0.004  # 0.01 is more than two standard errors
    assert large_bound.bits_per_dimension == pytest.approx(prior + terms.sum() + decoder, abs=0.01)
    assert large_bound.prior == pytest.approx(prior, abs=1e-3)
    assert large_bound.terms[-1] == pytest.approx(decoder, abs=0.01)


def test_every_term_of_the_gaussian_chain_is_the_kl_of_its_own_timestep(large_bound):
    _, terms, _ = oracle()
    # a mean of 512,000 squared errors has a relative deviation of √(2/512,000) = 0.2 %
    np.testing.assert_allclose(large_bound.terms[:-1], terms, rtol=0.01)
    assert list(large_bound.timesteps) == list(range(T - 1, -1, -1))


def test_the_bound_stays_above_the_entropy_of_the_data(large_bound):
    _, probabilities = levels_and_probabilities()
    entropy = scipy.stats.entropy(probabilities, base=2)
    assert large_bound.bits_per_dimension > entropy


def test_a_wrong_network_costs_bits():
    images = gaussian_images(64, seed=3)
    wrong = gaussian_network(deviation=0.7)
    good = variational_bound(gaussian_network(), chain(), images).bits_per_dimension
    assert variational_bound(wrong, chain(), images).bits_per_dimension > good + 0.05


def test_the_parts_add_up_to_the_whole():
    bound = variational_bound(gaussian_network(), chain(), gaussian_images(5, seed=4))
    assert bound.prior + bound.terms.sum() == pytest.approx(bound.bits_per_dimension, rel=1e-12)


def test_batch_size_does_not_change_the_figure():
    images = gaussian_images(3, seed=5)
    one, seven = (
        variational_bound(gaussian_network(), chain(), images, batch_size=size) for size in (1, 7)
    )
    np.testing.assert_allclose(one.per_image, seven.per_image, rtol=1e-12)


def test_another_seed_draws_other_noise():
    images = gaussian_images(3, seed=6)
    one, other = (
        variational_bound(gaussian_network(), chain(), images, seed=seed).per_image
        for seed in (0, 1)
    )
    assert (one != other).all()


@pytest.mark.parametrize("rows_per_image", [7, 30])
def test_visiting_fewer_rows_is_unbiased(rows_per_image):
    # one image many times over: the spread left is the choice of rows and their noise
    images = np.repeat(gaussian_images(1, seed=7), 3000, axis=0)
    full = variational_bound(gaussian_network(), chain(), images[:300])
    part = variational_bound(gaussian_network(), chain(), images, rows_per_image=rows_per_image)
    error = math.hypot(full.standard_error, part.standard_error)
    assert abs(part.bits_per_dimension - full.bits_per_dimension) < 4 * error
    assert error < 0.02 * full.bits_per_dimension


def test_a_respaced_chain_has_its_own_looser_bound():
    images = gaussian_images(64, seed=8)
    whole, short = (
        variational_bound(gaussian_network(), chain(steps), images).bits_per_dimension
        for steps in (T, 10)
    )
    assert short > whole


def test_a_network_that_knows_the_image_pays_for_the_prior_and_the_bins_only():
    value = 200 / 127.5 - 1
    signal_squared = SCHEDULE.alphas_cumprod

    def knows(sample, timestep, label):
        squared = signal_squared[timestep.astype(int)][:, None, None, None]
        return (sample - np.sqrt(squared) * value) / np.sqrt(1 - squared)

    images = np.full((4, *SHAPE), 200, np.uint8)
    bound = variational_bound(FunctionBackend(knows, (1, 8, 8)), chain(), images)
    first, second = SCHEDULE.alphas_cumprod[:2]
    sigma = math.sqrt((1 - first) / (1 - second) * SCHEDULE.betas[1])
    mass = math.erf(1 / 255 / sigma / math.sqrt(2))
    assert np.abs(bound.terms[:-1]).max() < 1e-6  # float32 predictions
    assert bound.terms[-1] == pytest.approx(-math.log2(mass), rel=1e-4)


def test_labels_reach_the_network_and_none_is_the_class_after_the_last():
    seen = []

    def notes(sample, timestep, label):
        seen.append(label.copy())
        return sample

    backend = FunctionBackend(notes, (1, 8, 8), num_classes=10)
    images, labels = gaussian_images(2, seed=9), np.array([3, 7])
    variational_bound(backend, chain(), images, labels, batch_size=2 * T)
    variational_bound(backend, chain(), images, batch_size=2 * T)
    assert list(seen[0]) == [3] * T + [7] * T
    assert set(seen[1]) == {10}


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_what_the_network_predicts_does_not_matter(prediction_type):
    epsilon = gaussian_epsilon(SCHEDULE, deviation=DEVIATION)

    def other(sample, timestep, label):
        squared = SCHEDULE.alphas_cumprod[timestep.astype(int)][:, None, None, None]
        signal, noise = np.sqrt(squared), np.sqrt(1 - squared)
        predicted = epsilon(sample, timestep, label)
        clean = (sample - noise * predicted) / signal
        return clean if prediction_type == "sample" else signal * predicted - noise * clean

    images = gaussian_images(4, seed=10)
    expected = variational_bound(gaussian_network(), chain(), images)
    found = variational_bound(
        FunctionBackend(other, (1, 8, 8)), chain(prediction_type=prediction_type), images
    )
    np.testing.assert_allclose(found.per_image, expected.per_image, rtol=1e-5)


# --- the mass of a bin ---------------------------------------------------------------------------


@pytest.mark.parametrize("near", [0.0, 0.3, 3.0, 12.0, 24.9, 25.1, 80.0, 400.0])
@pytest.mark.parametrize("width", [1e-3, 0.5, 7.0, np.inf])
def test_bin_masses_are_right_in_the_far_tails(near, width):
    low, high = np.array([near, -near - width]), np.array([near + width, -near])
    # the two logarithms are right to 1e-16 of themselves, and cancel in narrow bins
    upper, lower = scipy.stats.norm.logsf([near, near + width])
    lost = 1e-15 * abs(upper) / (1 - math.exp(lower - upper))
    np.testing.assert_allclose(
        log_interval_probability(low, high), log_mass(low, high), rtol=1e-9, atol=1e-7 + lost
    )


def test_bins_around_zero_and_the_whole_line():
    low = np.array([-1.0, -np.inf, -np.inf, -0.001])
    high = np.array([2.0, np.inf, 3.0, 0.002])
    expected = np.log(scipy.stats.norm.cdf(high) - scipy.stats.norm.cdf(low))
    np.testing.assert_allclose(
        log_interval_probability(low, high), expected, rtol=1e-10, atol=1e-15
    )


# --- refusals ------------------------------------------------------------------------------------


def test_a_sampler_without_a_density_is_refused():
    program = build_program(
        "ddim", schedule=SCHEDULE, prediction_type="epsilon", num_inference_steps=T
    )
    with pytest.raises(ConfigurationError, match=r"got a ddim program.*Choose sampler=ddpm"):
        variational_bound(gaussian_network(), program, gaussian_images(1, seed=0))


def test_images_of_another_size_are_refused():
    with pytest.raises(ConfigurationError, match=r"shape \(N, 8, 8, 1\)"):
        variational_bound(gaussian_network(), chain(), np.zeros((1, 9, 9, 1), np.uint8))


@pytest.mark.parametrize("rows_per_image", [0, 1, T + 1])
def test_impossible_numbers_of_rows_are_refused(rows_per_image):
    with pytest.raises(ConfigurationError, match=rf"\[2, {T}\]"):
        variational_bound(
            gaussian_network(),
            chain(),
            gaussian_images(1, seed=0),
            rows_per_image=rows_per_image,
        )
