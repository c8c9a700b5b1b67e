"""DDPM: ancestral sampling, over all timesteps or any subset of them.

    x_s = mean_from_x0 · x_0 + mean_from_x · x_t + σ · z

The mean is that of the posterior q(x_s | x_t, x_0) between the two levels visited; on a subset of
timesteps this is the respaced chain of Nichol & Dhariwal. The variance is one of

    fixed_small   β̃, the posterior's own: right if the data were one point
    fixed_large   β between the two levels: right if the data were N(0, I)

No noise is added by the last step.

Sources: Ho, Jain & Abbeel, arXiv 2006.11239 eq. 7, 11 and §3.2; Nichol & Dhariwal,
arXiv 2102.09672 §4. Order 1; one network evaluation a step.
"""

from __future__ import annotations

import numpy as np

from ..errors import choose
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import posterior_deviation, single_register_program

__all__ = ["VARIANCES", "ddpm"]

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(
    trajectory: Trajectory, *, clip: float, variance: str = "fixed_small"
) -> SamplerProgram:
    """Compile ancestral sampling.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        variance: one of :data:`VARIANCES`.

    Raises:
        ConfigurationError: unknown variance.
    """
    choose("variance", variance, VARIANCES)
    small = posterior_deviation(trajectory)
    mean_from_x = np.sqrt(trajectory.noise[1:] ** 2 - small**2) / trajectory.noise[:-1]
    sigma = small
    if variance == "fixed_large":
        ratio = trajectory.signal[:-1] / trajectory.signal[1:]
        beta = trajectory.noise[:-1] ** 2 - (ratio * trajectory.noise[1:]) ** 2
        sigma = np.where(trajectory.noise[1:] > 0, np.sqrt(beta), 0.0)
    return single_register_program(
        "ddpm",
        trajectory,
        mean_from_x,
        sigma,
        clip=clip,
        keeps_variance=variance == "fixed_small",
    )
