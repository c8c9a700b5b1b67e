"""iPNDM and PLMS: Adams–Bashforth on the network's ε.

A step moves x_t along a mean of this and the previous answers as if it were constant (DDIM, eq. 9
of PNDM):

    ε̄   = ε_t                                                     order 1
          (3·ε_t − ε_1)/2                                         order 2
          (23·ε_t − 16·ε_1 + 5·ε_2)/12                            order 3
          (55·ε_t − 59·ε_1 + 37·ε_2 − 9·ε_3)/24                   order 4
    x_s = signal_s/signal_t · x_t + (noise_s − noise_t·signal_s/signal_t) · ε̄

The coefficients are those of equal steps in σ = noise / signal; on other spacings the formal order
is 2, whatever the name says. The first steps have less history: iPNDM starts with orders 1, 2, 3;
PLMS (pseudo linear multistep, order 4) evaluates its first step twice and takes the mean of the
answers at both ends, so S steps cost S + 1 evaluations. The last step keeps the full order, as the
references do.

A clipped x_0 gives the ε that belongs to it, and that ε is what history keeps.

Sources: Liu et al., "Pseudo numerical methods for diffusion models", arXiv 2202.09778 eq. 9 and 12;
Zhang & Chen, "Fast sampling of diffusion models with exponential integrator", arXiv 2204.13902
appendix B (iPNDM). PLMS' warm-up: CompVis latent-diffusion, ``plms.py``.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import Symbols, checked_order, epsilon_of, program_from_weights, to_level

__all__ = ["ipndm", "plms"]

Order = Literal[1, 2, 3, 4]

_ADAMS_BASHFORTH = {  # order 1 is DDIM
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}

Array = NDArray[np.float64]


def ipndm(trajectory: Trajectory, *, clip: float, order: Order = 4) -> SamplerProgram:
    """Compile iPNDM.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        order: 1 … 4.

    Raises:
        ConfigurationError: an order there are no registers for.
    """
    checked_order(order, get_args(Order), "iPNDM keeps that many network answers")
    row = Symbols(order)
    weights = [
        _multistep_row(row, trajectory, t, t + 1, used=min(t + 1, order))
        for t in range(len(trajectory))
    ]
    return program_from_weights("ipndm", trajectory, np.stack(weights), clip=clip)


def plms(trajectory: Trajectory, *, clip: float) -> SamplerProgram:
    """Compile PLMS.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
    """
    S = len(trajectory)
    if S == 1 or trajectory.signal[0] == 0.0:  # no first step to take twice; none from no signal
        row = Symbols(4)
        weights = [_multistep_row(row, trajectory, t, t + 1, min(t + 1, 4)) for t in range(S)]
        return program_from_weights("plms", trajectory, np.stack(weights), clip=clip)
    row = Symbols(4)
    weights = _first_step_twice(row, trajectory)
    weights += [_multistep_row(row, trajectory, t, t + 1, min(t + 1, 4)) for t in range(1, S)]
    visited = trajectory.take([0, 1, *range(1, S)])
    return program_from_weights("plms", visited, np.stack(weights), clip=clip)


def _multistep_row(row: Symbols, trajectory: Trajectory, t: int, s: int, used: int) -> Array:
    """Registers: x_t, then the ε of the steps before."""
    epsilon = epsilon_of(row.x_t, row.x_0, trajectory.signal[t], trajectory.noise[t])
    history = [epsilon, *row.r[1:]]
    if used == 1:
        x_s = to_level(row.x_t, row.x_0, trajectory, t, s)
    else:
        mean = sum(c * answer for c, answer in zip(_ADAMS_BASHFORTH[used], history, strict=False))
        x_s = _along(row.x_t, mean, trajectory, t, s)
    return np.stack([x_s, *history[: len(row.r) - 1]])


def _first_step_twice(row: Symbols, trajectory: Trajectory) -> list[Array]:
    """Euler to level 1; then from level 0 again, along the mean of the answers at 0 and 1.

    Between the two, register 2 holds what is known of the second by then.
    """
    signal, noise = trajectory.signal, trajectory.noise
    at_0 = epsilon_of(row.x_t, row.x_0, signal[0], noise[0])
    at_1 = epsilon_of(row.x_t, row.x_0, signal[1], noise[1])
    euler = to_level(row.x_t, row.x_0, trajectory, 0, 1)
    begun = _along(row.x_t, at_0 / 2, trajectory, 0, 1)
    finished = row.r[2] + _along(row.zero, at_1 / 2, trajectory, 0, 1)
    return [
        np.stack([euler, at_0, begun, row.zero]),
        np.stack([finished, row.r[1], row.zero, row.zero]),
    ]


def _along(x_t: Array, epsilon: Array, trajectory: Trajectory, t: int, s: int) -> Array:
    """The exact step t → s if ε were constant. PNDM eq. 9."""
    signal, noise = trajectory.signal, trajectory.noise
    ratio = signal[s] / signal[t]
    return np.asarray(ratio * x_t + (noise[s] - ratio * noise[t]) * epsilon)
