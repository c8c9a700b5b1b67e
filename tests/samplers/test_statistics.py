"""Reliability R2–R4: whole chains, with the library's own noise, have the law that theory gives.

The laws are exact for the finite chain (not the data's, which a finite chain misses), so |z| < 5 at
N = 200,000 is a tight bar, and mutants planted in the same chain must break it.
"""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from ddpm_runtime.backends.function import FunctionBackend
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.noise import fill_noise
from ddpm_runtime.noise import noise as image_noise
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule
from helpers import float64_lanes, mixture, oracles

pytestmark = pytest.mark.slow

MEAN, DEVIATION = 0.3, 0.3
LANES, SHAPE = 100, (1, 40, 50)  # 200,000 pixels, each a chain of its own
SCHEDULE = make_schedule("linear", 100, beta_start=1e-3, beta_end=0.2)


R2 = "R2: |z| of mean and variance, N = 200,000 (bar 5)"
R3 = "R3: p of KS and χ², a mixture at N = 100,000 (bar 1e-6)"
R4 = "R4: |z| of correlations between lanes and between rows (bar 5)"


def scores(found):
    return " and ".join(f"{one:.2g}" for one in found)


def draw(number):
    """The library's noise for draw ``number`` of every image of seed 7: (200,000,) float64."""
    out = np.empty((LANES, np.prod(SHAPE)), np.float32)
    indices = np.arange(LANES, dtype=np.uint64)
    fill_noise(out, np.full(LANES, 7, np.uint64), indices, np.full(LANES, number, np.uint32))
    return out.ravel().astype(np.float64)


def program(variance):
    return build_program(
        "ddpm",
        schedule=SCHEDULE,
        prediction_type="epsilon",
        num_inference_steps=100,
        clip=np.inf,
        variance=variance,
    )


def levels():
    a = SCHEDULE.alphas_cumprod[::-1]
    return [*zip(np.sqrt(a), np.sqrt(1 - a), strict=True), (1.0, 0.0)]


def gaussian_epsilon(x, signal, noise):
    """The best ε for x_0 ~ N(MEAN, DEVIATION²)."""
    return noise * (x - signal * MEAN) / (signal**2 * DEVIATION**2 + noise**2)


def exact_moments(variance):
    """Mean and variance of the finite chain: it is linear and Gaussian all the way."""
    mean, spread = 0.0, 1.0
    for k, ((signal, noise), after) in enumerate(pairwise(levels())):
        gain = signal * DEVIATION**2 / (signal**2 * DEVIATION**2 + noise**2)
        # x_s = A x + B x_0 + σ z with x_0 = gain x + (1 − gain·signal)·MEAN
        A, small = oracles.conditional(1.0, 0.0, (signal, noise), after)
        B, _ = oracles.conditional(0.0, 1.0, (signal, noise), after)
        large = noise**2 - (signal / after[0]) ** 2 * after[1] ** 2
        added = 0.0 if k == 99 else small if variance == "fixed_small" else large
        mean = (A + B * gain) * mean + B * (1 - gain * signal) * MEAN
        spread = (A + B * gain) ** 2 * spread + added
    return mean, spread


def z_scores(x, variance):
    mean, spread = exact_moments(variance)
    n = x.size
    z_mean = (x.mean() - mean) / np.sqrt(spread / n)
    z_spread = (x.var() - spread) / (spread * np.sqrt(2 / n))
    return abs(z_mean), abs(z_spread)


def chain(p, epsilon):
    registers = draw(0)[None]
    for row in range(100):
        m = epsilon(registers[0], row)
        registers = float64_lanes.advance(p, row, registers, m, draw(row + 1))
    return registers[0]


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_moments_of_the_float64_chain_are_the_exact_recursion(variance, figures):
    at = levels()
    x = chain(program(variance), lambda x, row: gaussian_epsilon(x, *at[row]))
    found = z_scores(x, variance)
    figures.each(R2, f"{variance} in float64", scores(found))
    assert max(found) < 5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_moments_of_the_shipped_executor_are_the_exact_recursion(variance, figures):
    """The same in float32, through HostLanes."""
    a = SCHEDULE.alphas_cumprod

    def network(sample, timestep, label):
        at = a[timestep.astype(int)][:, None, None, None]
        return gaussian_epsilon(sample, np.sqrt(at), np.sqrt(1 - at))

    lanes = HostLanes(FunctionBackend(network, SHAPE), LANES)
    compiled = program(variance)
    for index in range(LANES):
        lanes.start(compiled, seed=7, index=index)
    finished = []
    while lanes.active:
        finished += lanes.advance()
    x = np.stack([lane.image for lane in finished]).astype(np.float64)
    found = z_scores(x, variance)
    figures.each(R2, f"{variance} as shipped", scores(found))
    assert max(found) < 5


def mutated(p, **columns):
    """The program with changed columns, past its own checks."""
    return SimpleNamespace(
        **{**{name: getattr(p, name) for name in dir(p) if name[0] != "_"}, **columns}
    )


def off_by_one(p):
    at = levels()
    return p, lambda x, row: gaussian_epsilon(x, *at[min(row + 1, 99)])


def one_percent(p):
    at = levels()
    weights = p.weights.copy()
    weights[:, 0, 2] *= 1.01
    return mutated(p, weights=weights), lambda x, row: gaussian_epsilon(x, *at[row])


def wrong_variance(p):
    at = levels()
    return program("fixed_large"), lambda x, row: gaussian_epsilon(x, *at[row])


@pytest.mark.parametrize("mutant", [off_by_one, one_percent, wrong_variance])
def test_the_moments_have_the_power_to_find_planted_mutants(mutant, figures):
    x = chain(*mutant(program("fixed_small")))
    found = z_scores(x, "fixed_small")
    figures.each(R2, f"planted {mutant.__name__}", scores(found))
    assert max(found) > 5


def test_program_checks_refuse_the_one_percent_mutant_outright():
    from ddpm_runtime.errors import ConfigurationError
    from ddpm_runtime.program import SamplerProgram

    p = program("fixed_small")
    weights = p.weights.copy()
    weights[50, 0, 2] *= 1.01
    columns = ("timesteps", "input_scale", "x0_from_x", "x0_from_m", "clip", "signal", "noise")
    with pytest.raises(ConfigurationError, match="row 50 leaves signal level"):
        SamplerProgram(sampler="mutant", weights=weights, **{c: getattr(p, c) for c in columns})


# --- R3: a mixture --------------------------------------------------------------------------------

MIXTURE_STEPS, N = 25, 100_000


@pytest.fixture(scope="module")
def mixture_program():
    return build_program(
        "ddpm",
        schedule=make_schedule(),
        prediction_type="sample",
        num_inference_steps=MIXTURE_STEPS,
        spacing="trailing",
        clip=np.inf,
    )


@pytest.fixture(scope="module")
def exact_cdf(mixture_program):
    """The law of the last x of the finite chain, by quadrature of its Markov kernels.

    The grid step is 1/14 of the narrowest kernel, where the trapezoid rule is exact to rounding.
    The last step is x_0(x), rising in x: it carries the distribution function over.
    """
    t = mixture_program.timesteps.astype(int)
    a = make_schedule().alphas_cumprod[t]
    at = [*zip(np.sqrt(a), np.sqrt(1 - a), strict=True), (1.0, 0.0)]
    x = np.linspace(-5.5, 5.5, 1500)
    density = stats.norm.pdf(x)
    for level, after in pairwise(at[:-1]):
        mean, variance = oracles.conditional(x, mixture.denoiser(x, *level), level, after)
        kernel = np.exp(-((x[:, None] - mean) ** 2) / (2 * variance))
        density = kernel @ density / np.sqrt(2 * np.pi * variance) * (x[1] - x[0])
    cumulative = np.cumsum(density) * (x[1] - x[0])
    # the trapezoid rule up to each point
    cumulative -= density / 2 * (x[1] - x[0])
    assert cumulative[-1] == pytest.approx(1.0, abs=1e-6)
    final = mixture.denoiser(x, *at[-2])
    assert (np.diff(final) > 0).all()
    return lambda y: np.interp(y, final, cumulative)


def mixture_chain(p, *, shift=0, reused=False):
    registers = draw(0)[None, :N]
    for row in range(len(p)):
        seen = min(row + shift, len(p) - 1)
        m = mixture.denoiser(registers[0], p.signal[seen], p.noise[seen])
        z = draw(1 if reused else row + 1)[:N]
        registers = float64_lanes.advance(p, row, registers, m, z)
    return registers[0]


def p_values(x, cdf):
    u = cdf(x)
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    return stats.kstest(u, "uniform").pvalue, stats.chisquare(counts).pvalue


def test_a_mixture_has_the_law_of_the_finite_chain(mixture_program, exact_cdf, figures):
    found = p_values(mixture_chain(mixture_program), exact_cdf)
    figures.each(R3, "right", scores(found))
    assert min(found) > 1e-6


@pytest.mark.parametrize("planted", [{"shift": 1}, {"reused": True}], ids=str)
def test_the_law_has_the_power_to_find_planted_mutants(
    mixture_program, exact_cdf, planted, figures
):
    found = p_values(mixture_chain(mixture_program, **planted), exact_cdf)
    figures.each(R3, f"planted {next(iter(planted))}", scores(found))
    assert min(found) < 1e-6


# --- R4: noise wiring -----------------------------------------------------------------------------


def noise_that_reached_the_lanes(seeds):
    """z of every lane and row, read back from what the network is shown: (rows, lanes, pixels)."""
    compiled = build_program(
        "ddpm",
        schedule=SCHEDULE,
        prediction_type="sample",
        num_inference_steps=40,
        clip=np.inf,
    )
    seen = []

    def network(sample, timestep, label):
        seen.append(sample.reshape(len(sample), -1).astype(np.float64))
        return np.zeros_like(sample)  # x_0 = 0: a row is x_s = A·x_t + σ·z

    lanes = HostLanes(FunctionBackend(network, (1, 50, 80)), len(seeds))
    for index, seed in enumerate(seeds):
        lanes.start(compiled, seed=seed, index=index if len(set(seeds)) == 1 else 0)
    while lanes.active:
        lanes.advance()
    A, sigma = compiled.weights[:-1, 0, 0], compiled.weights[:-1, 0, 3]
    z = [(after - a * x) / s for x, after, a, s in zip(seen, seen[1:], A, sigma, strict=False)]
    return np.stack([seen[0], *z])


def correlation_scores(z):
    """|z-score| of every lane pair's correlation, and of every lane's from row to row."""
    rows, lanes, pixels = z.shape
    flat = z.transpose(1, 0, 2).reshape(lanes, -1)
    pairs = np.corrcoef(flat)[np.triu_indices(lanes, 1)] * np.sqrt(flat.shape[1])
    follow = (z[1:] * z[:-1]).mean(axis=(0, 2)) * np.sqrt((rows - 1) * pixels)
    return np.abs(pairs).max(), np.abs(follow).max()


@pytest.mark.parametrize("seeds", [[3] * 12, list(range(12))], ids=["one-seed", "many-seeds"])
def test_noise_of_lanes_and_steps_is_uncorrelated(seeds, figures):
    z = noise_that_reached_the_lanes(seeds)
    found = correlation_scores(z)
    figures.each(R4, "one seed" if len(set(seeds)) == 1 else "many seeds", scores(found))
    assert max(found) < 5
    # and it is the noise that its coordinates name: row k draws number k + 1
    for row, lane in ((0, 0), (1, 3), (39, 11)):
        index = lane if len(set(seeds)) == 1 else 0
        assert np.allclose(z[row, lane], image_noise(seeds[lane], index, row, 4000), atol=2e-4)


def test_shared_noise_would_be_seen():
    """The control: two lanes given the same seed and index share their noise."""
    z = noise_that_reached_the_lanes([3, 3, 5, 6])
    shared = z.copy()
    shared[:, 1] = shared[:, 0]
    assert correlation_scores(shared)[0] > 100
    repeated = z.copy()
    repeated[1:] = repeated[:1]
    assert correlation_scores(repeated)[1] > 100
