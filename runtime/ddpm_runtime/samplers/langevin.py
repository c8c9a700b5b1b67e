"""Annealed Langevin dynamics, and predictor–corrector sampling.

At one noise level a Langevin step walks up the score and adds noise:

    x ← x + ½·a·score(x) + √a·z,        score(x) = −ε / noise = (signal · x_0 − x) / noise²

With a = c·noise² this is the row x ← (1 − c/2)·x + (c/2)·signal·x_0 + √c·noise·z.

*Annealed Langevin* makes ``inner_steps`` of them at each level, then keeps x / signal as it is and
goes on at the next. It ends with the clean image x_0 of its last sample, one more evaluation.
Song & Ermon's a_i = ϵ·σ_i²/σ_L² is c = ϵ/σ_L² at every level; theirs is 0.2.

*Predictor–corrector* makes ``corrector_steps`` of them before each ancestral step, as Song et al.'s
code does. They set a = 2·(r·‖z‖/‖score‖)² with norms of the batch at hand; here the norms are
replaced by what they are on the noise level, ‖score‖ = ‖z‖/noise, so c = 4·r² and no image depends
on its neighbours.

Neither keeps the level's variance exactly, nor claims to: Langevin steps of finite length do not.

Sources: Song & Ermon, arXiv 1907.05600 Algorithm 1; the last denoising: Jolicoeur-Martineau et al.,
arXiv 2009.05475 §3.1; Song et al., arXiv 2011.13456 Algorithms 1 and 3–5. One evaluation a row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import Symbols, posterior_deviation, program_from_weights

__all__ = ["langevin", "predictor_corrector"]

Array = NDArray[np.float64]


def langevin(
    trajectory: Trajectory, *, clip: float, inner_steps: int = 5, step_size: float = 0.2
) -> SamplerProgram:
    """Compile annealed Langevin dynamics: inner_steps · S + 1 evaluations.

    Args:
        trajectory: the levels to visit; all need signal.
        clip: bound of x_0, infinity for none.
        inner_steps: Langevin steps at each level, ≥ 1.
        step_size: c, in (0, 2]: the step in units of the level's noise variance.

    Raises:
        ConfigurationError: a number out of range, or a trajectory that starts without signal.
    """
    _check_count("inner_steps", inner_steps, least=1)
    _check_open("step_size", step_size, 2.0)
    if trajectory.signal[0] == 0.0:
        raise ConfigurationError(
            "annealed Langevin dynamics needs signal at every level, and this trajectory starts "
            "with none (zero terminal SNR); choose another sampler, or a spacing or schedule that "
            "keeps some."
        )
    S = len(trajectory)
    row = Symbols(1)
    weights = []
    for t in range(S):
        walk = _langevin_step(row, trajectory, t, step_size)
        to_next = trajectory.signal[t + 1] / trajectory.signal[t] if t + 1 < S else 1.0
        weights += [walk] * (inner_steps - 1) + [to_next * walk]
    weights.append(trajectory.signal[-1] * row.x_0)
    visited = trajectory.take([*np.repeat(np.arange(S), inner_steps), S - 1])
    return program_from_weights(
        "langevin", visited, np.stack(weights)[:, None], clip=clip, keeps_variance=False
    )


def predictor_corrector(
    trajectory: Trajectory, *, clip: float, corrector_steps: int = 1, snr: float = 0.16
) -> SamplerProgram:
    """Compile predictor–corrector sampling: (corrector_steps + 1) · S evaluations.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        corrector_steps: Langevin steps before each ancestral step, ≥ 0.
        snr: r, in (0, 0.7]; 0.16 for VE networks in the paper.

    Raises:
        ConfigurationError: a number out of range.
    """
    _check_count("corrector_steps", corrector_steps, least=0)
    _check_open("snr", snr, 0.7)
    S = len(trajectory)
    sigma = posterior_deviation(trajectory)
    row = Symbols(1)
    weights = []
    for t in range(S):
        weights += [_langevin_step(row, trajectory, t, 4.0 * snr**2)] * corrector_steps
        kept = np.sqrt(trajectory.noise[t + 1] ** 2 - sigma[t] ** 2) / trajectory.noise[t]
        from_x_0 = trajectory.signal[t + 1] - kept * trajectory.signal[t]
        weights.append(kept * row.x_t + from_x_0 * row.x_0 + sigma[t] * row.z)
    visited = trajectory.take(np.repeat(np.arange(S), corrector_steps + 1))
    return program_from_weights(
        "predictor_corrector", visited, np.stack(weights)[:, None], clip=clip, keeps_variance=False
    )


def _langevin_step(row: Symbols, trajectory: Trajectory, t: int, c: float) -> Array:
    signal, noise = trajectory.signal[t], trajectory.noise[t]
    return np.asarray(
        (1.0 - c / 2.0) * row.x_t + (c / 2.0) * signal * row.x_0 + np.sqrt(c) * noise * row.z
    )


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigurationError(
            f"{name} must be ≥ {least}; got {value}. The nearest valid choice is {least}."
        )


def _check_open(name: str, value: float, largest: float) -> None:
    if not 0.0 < value <= largest:
        raise ConfigurationError(
            f"{name} must lie in (0, {largest:g}]; got {value}. "
            f"The nearest valid choice is {largest if value > largest else 0.01:g}."
        )
