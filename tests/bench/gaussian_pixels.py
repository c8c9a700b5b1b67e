"""A world where every term of the bound is known: Gaussian pixels.

Data: each pixel is N(0, s²) rounded to one of 256 levels. Network: the exact E[ε | x_t] of that
Gaussian. The oracle never touches the code under test, its noise or its tables: betas by hand, KLs
between one-dimensional Gaussians summed out, the decoder by quadrature over every level.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import scipy.stats

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
from helpers.analytic import gaussian_epsilon

T = 250
BETA_START, BETA_END = 1e-3, 0.05
DEVIATION = 0.35
SHAPE = (8, 8, 1)
SCHEDULE = make_schedule("linear", T, beta_start=BETA_START, beta_end=BETA_END)


def chain(steps: int = T, **options):
    settings = {"prediction_type": "epsilon", "clip": math.inf, **options}
    return build_program("ddpm", schedule=SCHEDULE, num_inference_steps=steps, **settings)


def gaussian_network(size: int = 8, deviation: float = DEVIATION) -> FunctionBackend:
    """The exact E[ε | x_t], or that of pixels of another deviation."""
    return FunctionBackend(gaussian_epsilon(SCHEDULE, deviation=deviation), (1, size, size))


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


def numeric_kl(variance: float, model_variance: float, offset_variance: float) -> float:
    """KL(N(0, variance) ‖ N(d, model_variance)), mean over d ~ N(0, offset_variance), by sums."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    weights = weights / weights.sum()
    y, d = math.sqrt(variance) * nodes[:, None], math.sqrt(offset_variance) * nodes
    log_ratio = scipy.stats.norm.logpdf(y, 0, math.sqrt(variance)) - scipy.stats.norm.logpdf(
        y, d, math.sqrt(model_variance)
    )
    return float(weights @ log_ratio @ weights)


@cache
def hand_made_betas() -> list[float]:
    return [BETA_START + (BETA_END - BETA_START) * t / (T - 1) for t in range(T)]


@cache
def posterior_variance(t: int) -> float:  # β̃ of eq. 7
    noise_squared = [1 - math.prod(1 - beta for beta in hand_made_betas()[:n]) for n in (t, t + 1)]
    return noise_squared[0] / noise_squared[1] * hand_made_betas()[t]


def oracle(variance=posterior_variance, decoder_variance=None) -> tuple[float, np.ndarray, float]:
    """L_T, the L_{t−1} for t = T … 2, and L_0, in bits a pixel, of the exact Gaussian network.

    Args:
        variance: σ² of the network's step from t.
        decoder_variance: σ² of the decoder; β̃ at t = 1 if None.
    """
    values, probabilities = levels_and_probabilities()
    second_moment = float(probabilities @ values**2)
    betas = hand_made_betas()
    alpha_bars = [math.prod(1 - beta for beta in betas[: t + 1]) for t in range(T)]

    last = alpha_bars[-1]
    prior = 0.5 * (last * second_moment + (1 - last) - 1 - math.log(1 - last))

    def shrink(t: int) -> float:  # E[x_0 | x_t] = shrink · x_t
        return math.sqrt(alpha_bars[t]) * DEVIATION**2 / (
            alpha_bars[t] * DEVIATION**2 + 1 - alpha_bars[t]
        )  # fmt: skip

    terms = []
    for t in range(T - 1, 0, -1):
        from_x0 = math.sqrt(alpha_bars[t - 1]) * betas[t] / (1 - alpha_bars[t])  # eq. 7
        keep = 1 - shrink(t) * math.sqrt(alpha_bars[t])
        error = keep**2 * second_moment + shrink(t) ** 2 * (1 - alpha_bars[t])
        terms.append(numeric_kl(posterior_variance(t), variance(t), from_x0**2 * error))

    # L_0: for every level, Gauss–Hermite over the noise of x_1, exact bin mass
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    sigma = math.sqrt(decoder_variance or posterior_variance(1))
    decoder = 0.0
    for level, (value, probability) in enumerate(zip(values, probabilities, strict=True)):
        x_1 = math.sqrt(alpha_bars[0]) * value + math.sqrt(1 - alpha_bars[0]) * nodes
        mean = shrink(0) * x_1  # x_0's coefficient is 1 and x_1's is 0 in the last posterior
        low = -np.inf if level == 0 else (value - 1 / 255 - mean) / sigma
        high = np.inf if level == 255 else (value + 1 / 255 - mean) / sigma
        decoder -= probability * float(weights @ log_mass(low, high))
    bits = 1 / math.log(2)
    return prior * bits, np.array(terms) * bits, decoder * bits
