"""What several samplers share: formulas between two neighbouring levels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..program import SamplerProgram
from ..trajectory import Trajectory

Array = NDArray[np.float64]


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


def single_register_program(
    sampler: str,
    trajectory: Trajectory,
    mean_from_x: Array,
    sigma: Array,
    *,
    clip: float,
    keeps_variance: bool = True,
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
    """
    weights = np.zeros((len(trajectory), 1, 4))
    weights[:, 0, 0] = mean_from_x
    weights[:, 0, 2] = trajectory.signal[1:] - mean_from_x * trajectory.signal[:-1]
    weights[:, 0, 3] = sigma
    return program_from_weights(
        sampler, trajectory, weights, clip=clip, keeps_variance=keeps_variance
    )


def program_from_weights(
    sampler: str,
    trajectory: Trajectory,
    weights: Array,
    *,
    clip: float,
    keeps_variance: bool = True,
) -> SamplerProgram:
    """A program of one row a step: the trajectory's columns beside a sampler's weights.

    Args:
        sampler: name.
        trajectory: S steps.
        weights: (S, K + 1, K + 4).
        clip: bound of x_0, infinity for none.
        keeps_variance: see :class:`SamplerProgram`.
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
    )
