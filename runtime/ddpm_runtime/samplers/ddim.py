"""DDIM(η): from deterministic (η = 0) to ancestral (η = 1).

    x_s = signal_s · x_0 + √(noise_s² − σ²) · ε + σ · z,        ε = (x_t − signal_t · x_0) / noise_t
    σ   = η · noise_s · √(1 − (signal_t · noise_s)² / (signal_s · noise_t)²)

For a DDPM schedule σ is the paper's η·√((1 − ᾱ_s)/(1 − ᾱ_t))·√(1 − ᾱ_t/ᾱ_s). ε is derived again
from the clipped x_0, so clipping keeps x_s on its noise level.

Source: Song, Meng & Ermon, "Denoising diffusion implicit models", arXiv 2010.02502 eq. 12 and 16.
Order 1; one network evaluation a step.
"""

from __future__ import annotations

import numpy as np

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import posterior_deviation, single_register_program

__all__ = ["ddim"]


def ddim(trajectory: Trajectory, *, clip: float, eta: float = 0.0) -> SamplerProgram:
    """Compile DDIM.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        eta: η of eq. 16, in [0, 1].

    Raises:
        ConfigurationError: eta outside [0, 1].
    """
    return ddim_program("ddim", trajectory, clip, eta)


def ddim_program(sampler: str, trajectory: Trajectory, clip: float, eta: float) -> SamplerProgram:
    """DDIM under whichever of its names the user asked for."""
    sigma = checked_eta(eta) * posterior_deviation(trajectory)
    mean_from_x = np.sqrt(trajectory.noise[1:] ** 2 - sigma**2) / trajectory.noise[:-1]
    return single_register_program(sampler, trajectory, mean_from_x, sigma, clip=clip)


def checked_eta(eta: float) -> float:
    """Refuse an eta outside [0, 1], naming the nearest.

    Raises:
        ConfigurationError: eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        nearest = 0.0 if eta < 0.0 else 1.0
        raise ConfigurationError(
            f"eta must lie in [0, 1] (0 is deterministic, 1 is ancestral); got {eta}. "
            f"The nearest valid choice is {nearest:g}."
        )
    return eta
