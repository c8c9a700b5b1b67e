"""Bits per dimension: a bound on −log₂ p(image), of the chain that ancestral sampling runs.

    L     = L_T + Σ_rows L_row + L_0                                                     eq. 5
    L_T   = KL( q(x_T | x_0) ‖ p(x_T) )
    L_row = KL( q(x_s | x_t, x_0) ‖ p(x_s | x_t) )                                       eq. 8
          = Σ_pixels  log(σ/√β̃) + (β̃ + w_x0²·(x_0 − x̂_0)²) / (2·σ²) − ½
    L_0   = −log p(x_0 | x_t of the last row), a Gaussian over each pixel's bin          eq. 13

in bits (nats / ln 2) over the number of pixels times channels. Row t → s of the "ddpm" program
has mean w_x·x_t + w_x0·x̂_0 and deviation σ, the posterior the same mean of x_0 and variance β̃:
those very numbers are used, so the bound is that of the sampler as it runs, clipping included,
for any subset of timesteps. A learned variance is the network's second half of channels, read as
the program reads it, pixel by pixel (L_vlb of Nichol & Dhariwal).

The last row adds no noise when it samples. Its density has a fixed variance of the β̃ of the row
before, as in Ho et al.'s code (for fixed_large too), or a learned one. Nothing is clamped: a
pixel the network finds impossible costs what it costs.

Expectations over x_t use one draw each, from the image's own noise, so a figure does not depend
on batch size. Works through any backend; no PyTorch.

Sources: Ho, Jain & Abbeel, arXiv 2006.11239, equations as numbered above; Nichol & Dhariwal,
arXiv 2102.09672 eq. 15 and §3.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.backends import Backend, NetworkBinding
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.noise import fill_noise
from ddpm_runtime.program import SamplerProgram

__all__ = ["Bound", "log_interval_probability", "variational_bound"]

Array = NDArray[np.float64]
Rows = NDArray[np.int64]

HALF_BIN = 1.0 / 255.0  # of 256 levels over [−1, 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bound:
    """The bound and its parts, in bits per dimension.

    Args:
        per_image: (N,) the bound of each image.
        prior: L_T, mean over images.
        timesteps: (S,) of the rows, highest noise first.
        terms: (S,) mean of each row's term, L_0 last; NaN for a row never visited.
    """

    per_image: Array
    prior: float
    timesteps: Array
    terms: Array

    @property
    def bits_per_dimension(self) -> float:
        """Mean over images."""
        return float(self.per_image.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, from the spread between images (noise draws included); NaN for one."""
        if len(self.per_image) < 2:
            return math.nan
        return float(self.per_image.std(ddof=1) / math.sqrt(len(self.per_image)))


def variational_bound(
    backend: Backend,
    program: SamplerProgram,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None = None,
    *,
    seed: int = 0,
    rows_per_image: int | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], None] | None = None,
) -> Bound:
    """Bound the negative log-likelihood of images.

    Args:
        backend: the network.
        program: the "ddpm" sampler with any of its variances, S ≥ 2 rows. A network that learned
            its variance can be bounded with a fixed one, not the other way round.
        images: (N, H, W, C) uint8.
        labels: (N,) class of each image; None means "no class".
        seed: of the noise; image i uses index i.
        rows_per_image: how many rows to evaluate for each image, 2 … S; None means all. Fewer
            are drawn at random over the chain and weighted: unbiased, cheaper an image. L_0 is
            always evaluated.
        batch_size: network rows at a time; never changes the figure beyond rounding.
        on_progress: called with the number of network rows just evaluated.

    Raises:
        ConfigurationError: another sampler, a network that predicts no variance where one is
            wanted, or a value out of range.
    """
    _check_chain(program, backend)
    rows_per_image = len(program) if rows_per_image is None else rows_per_image
    if not 2 <= rows_per_image <= len(program):
        raise ConfigurationError(
            f"rows per image must lie in [2, {len(program)}], the rows of this program; "
            f"got {rows_per_image}."
        )
    clean = _clean(images, backend)
    bits_per_nat = 1.0 / (math.log(2.0) * clean[0].size)
    prior = _prior(program, clean) * bits_per_nat
    per_image, sums, visits = prior.copy(), np.zeros(len(program)), np.zeros(len(program))
    binding = backend.allocate(batch_size)
    plan = _visits(len(clean), len(program), rows_per_image, batch_size, seed)
    for chosen, rows, weights in plan:
        told = None if labels is None else labels[chosen]
        denoised = _denoise(backend, binding, program, clean[chosen], told, chosen, rows, seed)
        terms = _terms(program, clean[chosen], rows, *denoised) * bits_per_nat
        np.add.at(per_image, chosen, weights * terms)
        np.add.at(sums, rows, terms)
        np.add.at(visits, rows, 1.0)
        if on_progress is not None:
            on_progress(len(rows))
    with np.errstate(invalid="ignore"):
        means = sums / visits
    return Bound(
        per_image=per_image, prior=float(prior.mean()), timesteps=program.timesteps, terms=means
    )


def log_interval_probability(low: Array, high: Array) -> Array:
    """log of the mass of N(0, 1) in (low, high), accurate in the far tails.

    Args:
        low: float64, −∞ allowed.
        high: float64 > low, ∞ allowed.
    """
    # by symmetry let `near` be the end nearer to 0, unless 0 is inside
    flipped = high <= 0.0
    near, far = np.where(flipped, -high, low), np.where(flipped, -low, high)
    inside = near < 0.0
    tail_near, tail_far = _upper_tail(np.abs(near)), _upper_tail(far)
    mass = np.where(inside, 1.0 - tail_near - tail_far, tail_near - tail_far)
    remote = near > 25.0
    a, b = np.where(remote, near, 26.0), np.where(remote, far, 27.0)
    # φ(b)/φ(a) without squaring two large numbers apart
    share = np.exp(-0.5 * (b - a) * (b + a)) * _mills(b) / _mills(a)
    density = -0.5 * a * a - 0.5 * math.log(2.0 * math.pi)
    asymptotic = density + np.log(_mills(a)) + np.log1p(-share)
    logs: Array = np.where(remote, asymptotic, np.log(np.where(remote, 1.0, mass)))
    return logs


def _mills(a: Array) -> Array:
    """P(N(0, 1) > a) / φ(a) for a ≥ 25, off by less than 15/a⁶ of itself; 0 at infinity."""
    inverse = 1.0 / a
    squared = inverse * inverse
    return inverse * (1.0 - squared * (1.0 - 3.0 * squared))


def _check_chain(program: SamplerProgram, backend: Backend) -> None:
    """Refuse what is not a chain whose bound this file computes.

    Raises:
        ConfigurationError: another sampler, too few rows, or a variance the network lacks.
    """
    if program.sampler != "ddpm":
        raise ConfigurationError(
            f"only the ddpm sampler's chain has a density to bound; got a {program.sampler} "
            "program. Choose sampler=ddpm, with any variance."
        )
    channels = backend.shape.image[0]
    if program.learns_variance and backend.shape.prediction_channels != 2 * channels:
        raise ConfigurationError(
            f"a learned variance needs a network that predicts {2 * channels} channels, half of "
            f"them the variance; this one predicts {backend.shape.prediction_channels}. "
            "Choose variance=fixed_small or fixed_large."
        )
    if len(program) < 2:
        raise ConfigurationError("a bound needs at least 2 steps; use as many as in training.")


def _posterior_variance(program: SamplerProgram) -> Array:
    """(S,) β̃ of every row, from its mean: w_x²·noise_t² + β̃ = noise_s²; the last row's is 0."""
    kept: Array = program.weights[:, 0, 0] * program.noise[:-1]
    return (program.noise[1:] - kept) * (program.noise[1:] + kept)


def _clean(images: NDArray[np.uint8], backend: Backend) -> Array:
    """x_0 in [−1, 1], (N, C·H·W) float64 in the order the network has them."""
    channels, height, width = backend.shape.image
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise ConfigurationError(
            f"this network bounds uint8 images of shape (N, {height}, {width}, {channels}); "
            f"got {images.dtype} {images.shape}."
        )
    values: Array = np.moveaxis(images, -1, 1).reshape(len(images), -1) / 127.5 - 1.0
    return values


def _prior(program: SamplerProgram, clean: Array) -> Array:
    """L_T of each image in nats: N(signal·x_0, noise²) from N(0, initial_scale²)."""
    scale = program.initial_scale
    ratio = (program.noise[0] / scale) ** 2
    squares = ((program.signal[0] * clean / scale) ** 2).sum(axis=1)
    nats: Array = 0.5 * (squares + clean.shape[1] * (ratio - 1.0 - math.log(ratio)))
    return nats


def _visits(
    images: int, rows: int, rows_per_image: int, batch_size: int, seed: int
) -> Iterator[tuple[Rows, Rows, Array]]:
    """Batches of (image, row, weight): L_0 and a stratified sample of the other rows, every image.

    The S − 1 other rows are cut into rows_per_image − 1 strata, narrow at the low noise where
    terms are large (single rows while that lasts) and wide at the high noise. One row is drawn
    uniformly in each and weighs the stratum's width, so the weighted sum is unbiased.
    """
    strata, others = rows_per_image - 1, rows - 1
    k = np.arange(strata + 1)
    # quadratic edges, counted from the low noise, pushed up where they would repeat
    edges = np.maximum.accumulate(np.floor(others * (k / strata) ** 2) - k).astype(np.int64) + k
    widths = np.diff(edges)
    uniform = np.random.default_rng(seed).random((images, strata))
    drawn = np.empty((images, rows_per_image), np.int64)
    drawn[:, :-1] = others - 1 - (edges[:-1] + (uniform * widths).astype(np.int64))
    drawn[:, -1] = rows - 1
    weight = np.append(widths, 1).astype(np.float64)
    image = np.repeat(np.arange(images), rows_per_image)
    row, weights = drawn.reshape(-1), np.tile(weight, images)
    for begin in range(0, len(row), batch_size):
        here = slice(begin, begin + batch_size)
        yield image[here], row[here], weights[here]


def _denoise(
    backend: Backend,
    binding: NetworkBinding,
    program: SamplerProgram,
    clean: Array,
    labels: NDArray[np.int64] | None,
    indices: Rows,
    rows: Rows,
    seed: int,
) -> tuple[Array, Array, Array]:
    """x_t drawn from q(x_t | x_0); the network's x̂_0 and v for it. All (rows, D) float64.

    v is (rows, 0) where the network predicts no variance.
    """
    count = len(rows)
    epsilon = np.empty((count, clean.shape[1]), np.float32)
    fill_noise(
        epsilon,
        np.full(count, seed, np.uint64),
        indices.astype(np.uint64),
        (rows + 1).astype(np.uint32),
    )
    signal, noise = program.signal[rows, None], program.noise[rows, None]
    x_t = signal * clean + noise * epsilon
    scaled = program.input_scale[rows, None] * x_t
    binding.sample[:count] = scaled.reshape(count, *backend.shape.image)
    binding.timestep[:count] = program.timesteps[rows]
    binding.label[:count] = backend.shape.num_classes if labels is None else labels
    binding.run(count)
    answers = binding.prediction[:count].reshape(count, -1).astype(np.float64)
    pixels = clean.shape[1]
    m, v = answers[:, :pixels], answers[:, pixels:]
    x_0 = program.x0_from_x[rows, None] * x_t + program.x0_from_m[rows, None] * m
    bound = program.clip[rows, None]
    return x_t, np.clip(x_0, -bound, bound), v


def _terms(
    program: SamplerProgram, clean: Array, rows: Rows, x_t: Array, x_0: Array, v: Array
) -> Array:
    """The row's term of each visit, in nats: eq. 8, or eq. 13 for the last row."""
    from_x, from_x0 = program.weights[rows, 0, 0, None], program.weights[rows, 0, 2, None]
    sigma = _deviation(program, rows, v)
    nats = np.empty(len(rows))
    last = rows == len(program) - 1
    inner = ~last
    posterior = _posterior_variance(program)[rows[inner], None]
    ratio = posterior / sigma[inner] ** 2
    error = (from_x0[inner] * (clean - x_0)[inner] / sigma[inner]) ** 2
    nats[inner] = 0.5 * (error + (ratio - 1.0 - np.log(ratio))).sum(axis=1)
    mean = from_x[last] * x_t[last] + from_x0[last] * x_0[last]
    nats[last] = _decoder(clean[last], mean, sigma[last])
    return nats


def _deviation(program: SamplerProgram, rows: Rows, v: Array) -> Array:
    """σ of each visit's density: (rows, 1), or (rows, D) where it is learned."""
    if program.log_sigma_min is None or program.log_sigma_max is None:
        fixed = program.weights[:, 0, 3].copy()
        fixed[-1] = math.sqrt(_posterior_variance(program)[-2])
        return np.asarray(fixed[rows, None], dtype=np.float64)
    low, high = program.log_sigma_min[rows, None], program.log_sigma_max[rows, None]
    return np.asarray(np.exp(low + (v + 1.0) / 2.0 * (high - low)), dtype=np.float64)


def _decoder(clean: Array, mean: Array, deviation: Array) -> Array:
    """L_0 of each image in nats: the outermost bins reach to infinity. Source: eq. 13."""
    low = np.where(clean <= -1.0 + HALF_BIN, -np.inf, (clean - HALF_BIN - mean) / deviation)
    high = np.where(clean >= 1.0 - HALF_BIN, np.inf, (clean + HALF_BIN - mean) / deviation)
    nats: Array = -log_interval_probability(low, high).sum(axis=1)
    return nats


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _upper_tail(z: Array) -> Array:
    """P(N(0, 1) > z), for z ≥ 0 without cancellation."""
    tail: Array = 0.5 * np.asarray(_erfc(np.asarray(z) / math.sqrt(2.0)), dtype=np.float64)
    return tail
