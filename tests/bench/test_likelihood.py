"""ddpm_bench/likelihood.py against a world where every term is known: Gaussian pixels.

Data: each pixel is N(0, s²) rounded to one of 256 levels. Network: the exact E[ε | x_t] of that
Gaussian. The oracle below never touches the code under test, its noise or its tables: betas by
hand, KLs between one-dimensional Gaussians, the decoder by quadrature over every level.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from ddpm_bench.likelihood import log_interval_probability, variational_bound
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
from helpers.analytic import gaussian_epsilon

T = 250
BETA_START, BETA_END = 1e-3, 0.05
DEVIATION = 0.35
SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def schedule():
    return make_schedule("linear", T, beta_start=BETA_START, beta_end=BETA_END)


def chain(schedule, steps: int = T, **options):
    settings = {"prediction_type": "epsilon", "clip": math.inf, **options}
    return build_program("ddpm", schedule=schedule, num_inference_steps=steps, **settings)


@pytest.fixture(scope="module")
def gaussian_network(schedule):
    return FunctionBackend(gaussian_epsilon(schedule, deviation=DEVIATION), (1, 8, 8))


def levels_and_probabilities() -> tuple[np.ndarray, np.ndarray]:
    """The 256 pixel values in [−1, 1] and how often each is drawn."""
    values = np.arange(256) / 127.5 - 1
    edges = np.append(np.append(-np.inf, (values[1:] + values[:-1]) / 2), np.inf)
    return values, np.diff(scipy.stats.norm.cdf(edges, scale=DEVIATION))


def gaussian_images(count: int, seed: int, shape=SHAPE) -> np.ndarray:
    pixels = np.random.default_rng(seed).normal(0, DEVIATION, (count, *shape))
    return np.clip(np.rint((pixels + 1) * 127.5), 0, 255).astype(np.uint8)


def log_mass(low, high):
    """log P(low < N(0, 1) < high), by scipy's tails on whichever side of 0 the interval lies."""
    low, high = np.broadcast_arrays(low, high)
    tail = scipy.stats.norm.logcdf
    low, high = np.where(low > 0, -high, low), np.where(low > 0, -low, high)
    return tail(high) + np.log1p(-np.exp(tail(low) - tail(high)))


def oracle() -> tuple[float, np.ndarray, float]:
    """L_T, the L_{t−1} for t = T … 2, and L_0, in bits a pixel, of the exact Gaussian network."""
    values, probabilities = levels_and_probabilities()
    second_moment = float(probabilities @ values**2)
    betas = [BETA_START + (BETA_END - BETA_START) * t / (T - 1) for t in range(T)]
    alpha_bars = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(T)]

    last = alpha_bars[-1]
    prior = 0.5 * (last * second_moment + (1 - last) - 1 - math.log(1 - last))

    def shrink(t: int) -> float:  # E[x_0 | x_t] = shrink · x_t
        return math.sqrt(alpha_bars[t]) * DEVIATION**2 / (
            alpha_bars[t] * DEVIATION**2 + 1 - alpha_bars[t]
        )  # fmt: skip

    def posterior_variance(t: int) -> float:  # β̃ of eq. 7
        return (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t]) * betas[t]

    terms = []
    for t in range(T - 1, 0, -1):
        from_x0 = math.sqrt(alpha_bars[t - 1]) * betas[t] / (1 - alpha_bars[t])  # eq. 7
        keep = 1 - shrink(t) * math.sqrt(alpha_bars[t])
        error = keep**2 * second_moment + shrink(t) ** 2 * (1 - alpha_bars[t])
        terms.append(from_x0**2 * error / (2 * posterior_variance(t)))

    # L_0: for every level, Gauss–Hermite over the noise of x_1, exact bin mass
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    sigma = math.sqrt(posterior_variance(1))
    decoder = 0.0
    for level, (value, probability) in enumerate(zip(values, probabilities, strict=True)):
        x_1 = math.sqrt(alpha_bars[0]) * value + math.sqrt(1 - alpha_bars[0]) * nodes
        mean = shrink(0) * x_1  # x_0's coefficient is 1 and x_1's is 0 in the last posterior
        low = -np.inf if level == 0 else (value - 1 / 255 - mean) / sigma
        high = np.inf if level == 255 else (value + 1 / 255 - mean) / sigma
        decoder -= probability * float(weights @ log_mass(low, high))
    bits = 1 / math.log(2)
    return prior * bits, np.array(terms) * bits, decoder * bits


@pytest.fixture(scope="module")
def large_bound(schedule):
    """Over 512,000 pixels."""
    network = FunctionBackend(gaussian_epsilon(schedule, deviation=DEVIATION), (1, 16, 16))
    images = gaussian_images(2000, seed=0, shape=(16, 16, 1))
    return variational_bound(network, chain(schedule), images, batch_size=256)


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


def test_a_wrong_network_costs_bits(schedule, gaussian_network):
    images = gaussian_images(64, seed=3)
    wrong = FunctionBackend(gaussian_epsilon(schedule, deviation=0.7), (1, 8, 8))
    good = variational_bound(gaussian_network, chain(schedule), images).bits_per_dimension
    assert variational_bound(wrong, chain(schedule), images).bits_per_dimension > good + 0.05


def test_the_parts_add_up_to_the_whole(schedule, gaussian_network):
    bound = variational_bound(gaussian_network, chain(schedule), gaussian_images(5, seed=4))
    assert bound.prior + bound.terms.sum() == pytest.approx(bound.bits_per_dimension, rel=1e-12)


def test_batch_size_does_not_change_the_figure(schedule, gaussian_network):
    images = gaussian_images(3, seed=5)
    one, seven = (
        variational_bound(gaussian_network, chain(schedule), images, batch_size=size)
        for size in (1, 7)
    )
    np.testing.assert_allclose(one.per_image, seven.per_image, rtol=1e-12)


def test_another_seed_draws_other_noise(schedule, gaussian_network):
    images = gaussian_images(3, seed=6)
    one, other = (
        variational_bound(gaussian_network, chain(schedule), images, seed=seed).per_image
        for seed in (0, 1)
    )
    assert (one != other).all()


@pytest.mark.parametrize("rows_per_image", [7, 30])
def test_visiting_fewer_rows_is_unbiased(schedule, gaussian_network, rows_per_image):
    # one image many times over: the spread left is the choice of rows and their noise
    images = np.repeat(gaussian_images(1, seed=7), 3000, axis=0)
    full = variational_bound(gaussian_network, chain(schedule), images[:300])
    part = variational_bound(
        gaussian_network, chain(schedule), images, rows_per_image=rows_per_image
    )
    error = math.hypot(full.standard_error, part.standard_error)
    assert abs(part.bits_per_dimension - full.bits_per_dimension) < 4 * error
    assert error < 0.02 * full.bits_per_dimension


def test_a_respaced_chain_has_its_own_looser_bound(schedule, gaussian_network):
    images = gaussian_images(64, seed=8)
    whole, short = (
        variational_bound(gaussian_network, chain(schedule, steps), images).bits_per_dimension
        for steps in (T, 10)
    )
    assert short > whole


def test_a_network_that_knows_the_image_pays_for_the_prior_and_the_bins_only(schedule):
    value = 200 / 127.5 - 1
    signal_squared = schedule.alphas_cumprod

    def knows(sample, timestep, label):
        squared = signal_squared[timestep.astype(int)][:, None, None, None]
        return (sample - np.sqrt(squared) * value) / np.sqrt(1 - squared)

    images = np.full((4, *SHAPE), 200, np.uint8)
    bound = variational_bound(FunctionBackend(knows, (1, 8, 8)), chain(schedule), images)
    first, second = schedule.alphas_cumprod[:2]
    sigma = math.sqrt((1 - first) / (1 - second) * schedule.betas[1])
    mass = math.erf(1 / 255 / sigma / math.sqrt(2))
    assert np.abs(bound.terms[:-1]).max() < 1e-6  # float32 predictions
    assert bound.terms[-1] == pytest.approx(-math.log2(mass), rel=1e-4)


def test_labels_reach_the_network_and_none_is_the_class_after_the_last(schedule):
    seen = []

    def notes(sample, timestep, label):
        seen.append(label.copy())
        return sample

    backend = FunctionBackend(notes, (1, 8, 8), num_classes=10)
    images, labels = gaussian_images(2, seed=9), np.array([3, 7])
    variational_bound(backend, chain(schedule), images, labels, batch_size=2 * T)
    variational_bound(backend, chain(schedule), images, batch_size=2 * T)
    assert list(seen[0]) == [3] * T + [7] * T
    assert set(seen[1]) == {10}


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_what_the_network_predicts_does_not_matter(schedule, gaussian_network, prediction_type):
    epsilon = gaussian_epsilon(schedule, deviation=DEVIATION)

    def other(sample, timestep, label):
        squared = schedule.alphas_cumprod[timestep.astype(int)][:, None, None, None]
        signal, noise = np.sqrt(squared), np.sqrt(1 - squared)
        predicted = epsilon(sample, timestep, label)
        clean = (sample - noise * predicted) / signal
        return clean if prediction_type == "sample" else signal * predicted - noise * clean

    images = gaussian_images(4, seed=10)
    expected = variational_bound(gaussian_network, chain(schedule), images)
    found = variational_bound(
        FunctionBackend(other, (1, 8, 8)), chain(schedule, prediction_type=prediction_type), images
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


def test_a_sampler_without_a_density_is_refused(schedule, gaussian_network):
    program = build_program(
        "ddim", schedule=schedule, prediction_type="epsilon", num_inference_steps=T
    )
    with pytest.raises(ConfigurationError, match="ddpm sampler with variance=fixed_small"):
        variational_bound(gaussian_network, program, gaussian_images(1, seed=0))


def test_the_large_variance_is_refused(schedule, gaussian_network):
    program = chain(schedule, variance="fixed_large")
    with pytest.raises(ConfigurationError, match="variance=fixed_small"):
        variational_bound(gaussian_network, program, gaussian_images(1, seed=0))


def test_a_network_with_a_learned_variance_is_refused(schedule):
    backend = FunctionBackend(lambda x, t, y: x, (1, 8, 8), prediction_channels=2)
    with pytest.raises(ConfigurationError, match="without learned variance"):
        variational_bound(backend, chain(schedule), gaussian_images(1, seed=0))


def test_images_of_another_size_are_refused(schedule, gaussian_network):
    with pytest.raises(ConfigurationError, match=r"shape \(N, 8, 8, 1\)"):
        variational_bound(gaussian_network, chain(schedule), np.zeros((1, 9, 9, 1), np.uint8))


@pytest.mark.parametrize("rows_per_image", [0, 1, T + 1])
def test_impossible_numbers_of_rows_are_refused(schedule, gaussian_network, rows_per_image):
    with pytest.raises(ConfigurationError, match=rf"\[2, {T}\]"):
        variational_bound(
            gaussian_network,
            chain(schedule),
            gaussian_images(1, seed=0),
            rows_per_image=rows_per_image,
        )
