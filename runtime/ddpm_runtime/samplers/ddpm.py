"""DDPM: ancestral sampling, over all timesteps or any subset of them.

    x_s = mean_from_x0 · x_0 + mean_from_x · x_t + σ · z

The mean is that of the posterior q(x_s | x_t, x_0) between the two levels visited; on a subset of
timesteps this is the respaced chain of Nichol & Dhariwal. The variance σ² is one of

    fixed_small     β̃, the posterior's own: right if the data were one point
    fixed_large     β between the two levels: right if the data were N(0, I)
    learned         exp(v), v the second half of the network's channels
    learned_range   exp(u·log β + (1 − u)·log β̃), u = (v + 1)/2

β and β̃ are those between the two levels visited. No noise is added by the last step, whose β̃ is 0;
the learned range there is that of the density of the decoder, with the β̃ of the step before.

Sources: Ho, Jain & Abbeel, arXiv 2006.11239 eq. 7, 11 and §3.2; Nichol & Dhariwal,
arXiv 2102.09672 eq. 15 and §4. Order 1; one network evaluation a step.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import choose
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import posterior_deviation, single_register_program

__all__ = ["VARIANCES", "Variance", "ddpm"]

Variance = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
VARIANCES: tuple[str, ...] = get_args(Variance)

Array = NDArray[np.float64]


def ddpm(
    trajectory: Trajectory, *, clip: float, variance: Variance = "fixed_small"
) -> SamplerProgram:
    """Compile ancestral sampling.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        variance: one of :data:`VARIANCES`; the learned ones need a network that predicts twice as
            many channels.

    Raises:
        ConfigurationError: unknown variance.
    """
    choose("variance", variance, VARIANCES)
    small, large = posterior_deviation(trajectory), _forward_deviation(trajectory)
    mean_from_x = np.sqrt(trajectory.noise[1:] ** 2 - small**2) / trajectory.noise[:-1]
    noisy = trajectory.noise[1:] > 0
    columns: dict[str, Array] = {}
    if variance == "fixed_small":
        sigma = small
    elif variance == "fixed_large":
        sigma = np.where(noisy, large, 0.0)
    else:
        # the network says log σ between these two; the last row has no z to multiply
        sigma = noisy.astype(np.float64)
        if variance == "learned":
            low, high = np.full_like(small, -0.5), np.full_like(small, 0.5)
        else:
            decoder = small[-2] if len(small) > 1 else large[-1]
            low, high = np.log(np.where(noisy, small, decoder)), np.log(large)
        columns = {"log_sigma_min": low, "log_sigma_max": high}
    return single_register_program(
        "ddpm",
        trajectory,
        mean_from_x,
        sigma,
        clip=clip,
        keeps_variance=variance == "fixed_small",
        **columns,
    )


def _forward_deviation(trajectory: Trajectory) -> Array:
    """√β between the levels of every step t → s: what the forward process adds from s to t."""
    signal, noise = trajectory.signal, trajectory.noise
    ratio = signal[:-1] * noise[1:] / signal[1:]
    return np.asarray(np.sqrt((noise[:-1] - ratio) * (noise[:-1] + ratio)))
