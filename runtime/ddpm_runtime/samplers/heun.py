"""Heun's method of EDM: an Euler step, then the mean of the slopes at both its ends.

With x̂ = x / signal and σ = noise / signal, for each step t → s:

    x̂'_s = x̂_t + (σ_s − σ_t) · ε_t
    x̂_s  = x̂_t + (σ_s − σ_t) · (ε_t + ε'_s) / 2

The last step has no second slope (Algorithm 1 line 6: not where σ_s = 0), nor has a first step
from a level without signal, whose σ is infinite; those are Euler's.

Source: Karras et al., "Elucidating the design space of diffusion-based generative models",
arXiv 2206.00364 Algorithm 1. Order 2; two network evaluations a step, one for the last: 2·S − 1.
"""

from __future__ import annotations

import numpy as np

from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import epsilon_of, runge_kutta_program, to_level

__all__ = ["heun"]


def heun(trajectory: Trajectory, *, clip: float) -> SamplerProgram:
    """Compile Heun's method.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
    """
    signal, noise = trajectory.signal, trajectory.noise
    x_t, x_0, x_0_next = np.eye(3)
    steps, visited = [], []
    for t in range(len(trajectory)):
        s = t + 1
        euler = to_level(x_t, x_0, trajectory, t, s)
        if s == len(trajectory) or signal[t] == 0.0:
            steps.append([euler])
            visited += [t]
            continue
        mean_slope = 0.5 * (
            epsilon_of(x_t, x_0, signal[t], noise[t])
            + epsilon_of(euler, x_0_next, signal[s], noise[s])
        )
        length = noise[s] / signal[s] - noise[t] / signal[t]
        steps.append([euler, signal[s] * (x_t / signal[t] + length * mean_slope)])
        visited += [t, s]
    return runge_kutta_program("heun", trajectory.take(visited), steps, clip=clip)
