"""DDIM run backwards: from an image to the x_T that DDIM would draw it from.

    x_s = signal_s · x_0 + noise_s · ε,      now with s noisier than t

The image itself stands for the lowest level visited (signal·image, without its little noise). Not
in the list of samplers, because it begins with an image: see ``Engine.encode``.

Source: Song, Meng & Ermon, arXiv 2010.02502 §4.3 and eq. 13. Order 1.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..schedule import NoiseSchedule
from ..spacing import timestep_spacing
from ..trajectory import Trajectory, discrete_trajectory
from ._rows import single_register_program

__all__ = ["build_inversion", "ddim_inversion"]


def build_inversion(
    *, schedule: NoiseSchedule, prediction_type: str, num_inference_steps: int, spacing: str
) -> SamplerProgram:
    """Compile the inversion for a network trained on a schedule; arguments as for a sampler.

    Raises:
        ConfigurationError: fewer than two steps, more than T, or an unknown spacing.
    """
    if num_inference_steps < 2:
        raise ConfigurationError(
            f"encoding an image takes at least 2 steps; got {num_inference_steps}."
        )
    T = schedule.num_train_timesteps
    timesteps = timestep_spacing(spacing, T, num_inference_steps, schedule)
    return ddim_inversion(discrete_trajectory(schedule, prediction_type, timesteps))


def ddim_inversion(trajectory: Trajectory) -> SamplerProgram:
    """Compile the inversion of DDIM over a trajectory of S ≥ 2 steps: S − 1 rows.

    Args:
        trajectory: the levels DDIM would visit, highest noise first.
    """
    rising = {
        name: getattr(trajectory, name)[::-1]
        for name in ("timesteps", "input_scale", "x0_from_x", "x0_from_m")
    }
    levels = {name: getattr(trajectory, name)[:-1][::-1] for name in ("signal", "noise")}
    upward = replace(trajectory, **{name: column[:-1] for name, column in rising.items()}, **levels)
    # ε is never clipped: the image must come back
    return single_register_program(
        "ddim_inversion",
        upward,
        upward.noise[1:] / upward.noise[:-1],
        0.0 * upward.timesteps,
        clip=float("inf"),
    )
