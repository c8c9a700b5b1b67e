"""What several samplers share: formulas between levels, and how a formula becomes a row.

A row's weights are the coefficients of a linear formula. Solvers with history write the paper's
formula once, on the unit vectors of :class:`Symbols`, and the result *is* the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..trajectory import Trajectory

Array = NDArray[np.float64]


class Symbols:
    """Unit vectors for what a row may add up: a formula on them gives the row's weights.

    Args:
        registers: K + 1.

    Attributes:
        r: the registers r_0 … r_K; r_0 is x_t.
        x_0: the (clipped) clean image of this row.
        z: the row's noise.
    """

    def __init__(self, registers: int) -> None:
        unit = np.eye(registers + 3)
        self.r = unit[:registers]
        self.x_t: Array = unit[0]
        self.x_0: Array = unit[registers + 1]
        self.z: Array = unit[registers + 2]
        self.zero: Array = np.zeros(registers + 3)


def phi(k: int, z: float) -> float:
    """φ_k(z) = ∫₀¹ e^((1−u)z) u^(k−1)/(k−1)! du, the weights of exponential integrators.

    φ_1(z) = (e^z − 1)/z and φ_{k+1}(z) = (φ_k(z) − 1/k!)/z; by its power series for small z, where
    the recurrence would lose a digit for every digit of z, k times over.
    """
    if abs(z) < 1.0:
        return float(sum(z**j / factorial(j + k) for j in range(18)))
    value = float(np.expm1(z)) / z
    for j in range(1, k):
        value = (value - 1.0 / factorial(j)) / z
    return value


def posterior_deviation(trajectory: Trajectory) -> Array:
    """Standard deviation of q(x_s | x_t, x_0) for every step t → s.

        noise_s · √(1 − (signal_t · noise_s)² / (signal_s · noise_t)²)

    For a DDPM schedule its square is β̃ of Ho et al., arXiv 2006.11239 eq. 7.

    Returns:
        (S,) float64; exactly 0 where the step ends without noise.
    """
    signal, noise = trajectory.signal, trajectory.noise
    ratio = (signal[:-1] * noise[1:]) / (signal[1:] * noise[:-1])
    # 1 − ratio² as a product: no cancellation between neighbouring levels
    return noise[1:] * np.sqrt((1.0 - ratio) * (1.0 + ratio))


def epsilon_of(x_t: Array, x_0: Array, signal: float, noise: float) -> Array:
    """ε = (x_t − signal · x_0) / noise: of the clipped x_0, so x_t stays on its noise level."""
    return (x_t - signal * x_0) / noise


def to_level(x_t: Array, x_0: Array, trajectory: Trajectory, t: int, s: int) -> Array:
    """The exact step t → s if x_0 were constant: signal_s · x_0 + noise_s · ε.

    Source: DDIM, Song et al., arXiv 2010.02502 eq. 12 with σ = 0. Works without signal at t.
    """
    signal, noise = trajectory.signal, trajectory.noise
    ratio = noise[s] / noise[t]
    return np.asarray(ratio * x_t + (signal[s] - ratio * signal[t]) * x_0)


def usable_orders(trajectory: Trajectory, order: int) -> list[int]:
    """How many levels each step may look back over in log-SNR, itself included: 1 … order.

    Fewer at the start, where there is no history; 1 where the step itself is infinitely long (it
    ends without noise, or starts without signal); and never past a level without signal.
    """
    finite = np.isfinite(trajectory.log_snr)
    orders, run = [], 0
    for i in range(len(trajectory)):
        run = run + 1 if finite[i] else 0
        orders.append(min(order, run) if finite[i] and finite[i + 1] else 1)
    return orders


def checked_order(asked: int, possible: Sequence[int], why: str) -> int:
    """Refuse an order that a solver does not have, naming the nearest.

    Raises:
        ConfigurationError: ``asked`` is not among ``possible``.
    """
    if asked in possible:
        return asked
    nearest = min(possible, key=lambda order: abs(order - asked))
    raise ConfigurationError(
        f"order must be one of {', '.join(map(str, possible))} ({why}); got {asked}. "
        f"The nearest valid choice is {nearest}."
    )


def single_register_program(
    sampler: str,
    trajectory: Trajectory,
    mean_from_x: Array,
    sigma: Array,
    *,
    clip: float,
    keeps_variance: bool = True,
    **columns: Any,
) -> SamplerProgram:
    """A program without history: x_s = mean_from_x0 · x_0 + mean_from_x · x_t + sigma · z.

    ``mean_from_x0`` follows from the signal levels: mean_from_x0 + mean_from_x·signal_t = signal_s.

    Args:
        sampler: name.
        trajectory: S steps.
        mean_from_x: (S,).
        sigma: (S,).
        clip: bound of x_0, infinity for none.
        keeps_variance: see :class:`SamplerProgram`.
        **columns: further columns of the program.
    """
    weights = np.zeros((len(trajectory), 1, 4))
    weights[:, 0, 0] = mean_from_x
    weights[:, 0, 2] = trajectory.signal[1:] - mean_from_x * trajectory.signal[:-1]
    weights[:, 0, 3] = sigma
    return program_from_weights(
        sampler, trajectory, weights, clip=clip, keeps_variance=keeps_variance, **columns
    )


def runge_kutta_program(
    sampler: str, trajectory: Trajectory, steps: Sequence[Sequence[Array]], *, clip: float
) -> SamplerProgram:
    """A program of single-step methods with several evaluations a step.

    A step with n stages evaluates the network at x_t = X_0, then at X_1, …, X_{n−1}, and ends at
    X_n. Each X_j is a combination of x_t and of the clean images of the stages before it, so the
    registers hold *unfinished sums*: after stage i, register k holds the terms of X_{i+1+k} that
    are known by then, and stage i + 1 finds its own input finished in r_0.

    Args:
        sampler: name.
        trajectory: one level per evaluation (see :meth:`Trajectory.refine` and ``take``).
        steps: for each step X_1 … X_n, as vectors over (x_t, x_0 of stage 0, …, of stage n − 1).
        clip: bound of x_0, infinity for none.
    """
    registers = max(len(step) for step in steps)
    row = Symbols(registers)
    weights = []
    for step in steps:
        for stage in range(len(step)):
            after = [row.zero] * registers
            for k, X in enumerate(step[stage:]):
                begun = X[0] * row.x_t if stage == 0 else row.r[k + 1]
                after[k] = begun + X[1 + stage] * row.x_0
            weights.append(np.stack(after))
    return program_from_weights(sampler, trajectory, np.stack(weights), clip=clip)


def program_from_weights(
    sampler: str,
    trajectory: Trajectory,
    weights: Array,
    *,
    clip: float,
    keeps_variance: bool = True,
    **columns: Any,
) -> SamplerProgram:
    """A program of one row an evaluation: the trajectory's columns beside a sampler's weights.

    Args:
        sampler: name.
        trajectory: S evaluations.
        weights: (S, K + 1, K + 4).
        clip: bound of x_0, infinity for none.
        keeps_variance: see :class:`SamplerProgram`.
        **columns: further columns of the program (``log_sigma_min``, ...).
    """
    return SamplerProgram(
        sampler=sampler,
        timesteps=trajectory.timesteps,
        input_scale=trajectory.input_scale,
        x0_from_x=trajectory.x0_from_x,
        x0_from_m=trajectory.x0_from_m,
        clip=np.full(len(trajectory), clip),
        weights=weights,
        signal=trajectory.signal,
        noise=trajectory.noise,
        initial_scale=trajectory.initial_scale,
        keeps_variance=keeps_variance,
        **columns,
    )
