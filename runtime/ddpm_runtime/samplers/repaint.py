"""RePaint: DDPM that goes back up now and then, so that painted and given parts agree.

After every ``jump_length`` steps down, ``jump_count`` − 1 times, the image is diffused again

    x_t = (signal_t / signal_s) · x_s + √(noise_t² − (signal_t/signal_s)² · noise_s²) · z

up to where those steps began (a row without a network evaluation), and the steps are repeated. Made
for inpainting (``Settings.mask``); without a mask it is DDPM that takes longer.

Source: Lugmayr et al., arXiv 2201.09865 Algorithm 1 and Figure 9. Order 1; about ``jump_count``
network evaluations a step.
"""

from __future__ import annotations

import numpy as np

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..trajectory import Trajectory
from .ddpm import Variance, ddpm

__all__ = ["repaint"]


def repaint(
    trajectory: Trajectory,
    *,
    clip: float,
    jump_length: int = 10,
    jump_count: int = 10,
    variance: Variance = "fixed_small",
) -> SamplerProgram:
    """Compile RePaint.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        jump_length: steps down before each jump up, ≥ 1.
        jump_count: how often each stretch is walked down in all, ≥ 1; 1 is plain DDPM.
        variance: of the steps down, as for DDPM.

    Raises:
        ConfigurationError: a number below 1, or an unknown variance.
    """
    if jump_length < 1 or jump_count < 1:
        raise ConfigurationError(
            f"jump_length and jump_count must be ≥ 1; got {jump_length} and {jump_count}."
        )
    down = ddpm(trajectory, clip=clip, variance=variance)
    rows, levels = _walk(len(trajectory), jump_length, jump_count)
    evaluates = np.array([row is not None for row in rows])
    source = np.array(
        [level if row is None else row for row, level in zip(rows, levels, strict=False)]
    )
    source = np.minimum(source, len(trajectory) - 1)
    weights = down.weights[source]
    learned = {}
    for name in ("log_sigma_min", "log_sigma_max"):
        if down.learns_variance:  # of the steps down; a jump's noise is what it is
            learned[name] = np.where(evaluates, getattr(down, name)[source], 0.0)
    signal, noise = trajectory.signal[levels], trajectory.noise[levels]
    for i in np.flatnonzero(~evaluates):
        ratio = signal[i + 1] / signal[i]
        added = np.sqrt(noise[i + 1] ** 2 - (ratio * noise[i]) ** 2)
        weights[i, 0] = (ratio, 0.0, 0.0, added)
    return SamplerProgram(
        sampler="repaint",
        timesteps=trajectory.timesteps[source],
        input_scale=trajectory.input_scale[source],
        x0_from_x=trajectory.x0_from_x[source],
        x0_from_m=trajectory.x0_from_m[source],
        clip=np.full(len(rows), clip),
        weights=weights,
        signal=signal,
        noise=noise,
        initial_scale=trajectory.initial_scale,
        evaluates=evaluates,
        keeps_variance=down.keeps_variance,
        **learned,
    )


def _walk(steps: int, jump_length: int, jump_count: int) -> tuple[list[int | None], list[int]]:
    """The walk over levels 0 … steps: the step taken by each row (None for a jump up).

    Returns:
        The rows, and the level before each row and after the last.
    """
    rows: list[int | None] = []
    levels = [0]
    for begin in range(0, steps, jump_length):
        end = min(begin + jump_length, steps)
        # from the clean image there is no way back up: the last stretch is walked once
        times = jump_count if end < steps else 1
        for time in range(times):
            rows.extend(range(begin, end))
            levels.extend(range(begin + 1, end + 1))
            if time < times - 1:
                rows.append(None)
                levels.append(begin)
    return rows, levels
