"""Euler and Euler-ancestral, on the probability-flow ODE over σ = noise / signal.

With x̂ = x / signal the ODE is dx̂/dσ = ε (Karras et al., arXiv 2206.00364 eq. 1 with eq. 3), and

    Euler            x̂_s = x̂_t + (σ_s − σ_t) · ε
    Euler-ancestral  x̂_s = x̂_t + (σ_down − σ_t) · ε + σ_up · z
                     σ_up = η·σ_s·√(1 − σ_s²/σ_t²),   σ_down² = σ_s² − σ_up²

Both are old friends: x̂_t = x_0 + σ_t·ε turns Euler into DDIM(0), and Euler-ancestral into DDIM(η),
term by term, clipped or not. They are kept under the names k-diffusion gave them, with its default
η = 1 (which is also DDPM's fixed_small).

Sources: Karras et al., arXiv 2206.00364 Algorithm 1 without its second-order branch; k-diffusion,
``sample_euler_ancestral``. Order 1; one network evaluation a step.
"""

from __future__ import annotations

from ..program import SamplerProgram
from ..trajectory import Trajectory
from .ddim import ddim_program

__all__ = ["euler", "euler_ancestral"]


def euler(trajectory: Trajectory, *, clip: float) -> SamplerProgram:
    """Compile Euler's method.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
    """
    return ddim_program("euler", trajectory, clip, eta=0.0)


def euler_ancestral(trajectory: Trajectory, *, clip: float, eta: float = 1.0) -> SamplerProgram:
    """Compile Euler's method with ancestral noise.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        eta: how much of the noise is drawn anew, in [0, 1].

    Raises:
        ConfigurationError: eta outside [0, 1].
    """
    return ddim_program("euler_ancestral", trajectory, clip, eta)
