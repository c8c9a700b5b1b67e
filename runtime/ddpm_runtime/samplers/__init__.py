"""Every sampler by name: what it is, and the function that compiles it.

A sampler is a function ``(trajectory, *, clip, **options) -> SamplerProgram``. Adding one is adding
a file with such a function and an entry to :data:`SAMPLERS`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import choose
from ..program import SamplerProgram
from ..schedule import NoiseSchedule, timestep_spacing
from ..trajectory import discrete_trajectory
from .ddim import ddim
from .ddpm import ddpm

__all__ = ["SAMPLERS", "Sampler", "build_program"]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a user may want to know before choosing.

    Args:
        build: compiles the program.
        order: order of convergence in the step size.
        evaluations_per_step: network evaluations a step.
        stochastic: whether it draws noise (with its default options).
        recommended_steps: a good number of steps to start from.
        source: paper, arXiv id, equation.
    """

    build: Callable[..., SamplerProgram]
    order: int
    evaluations_per_step: int
    stochastic: bool
    recommended_steps: int
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of this sampler and their defaults."""
        parameters = list(inspect.signature(self.build).parameters.values())
        return {p.name: p.default for p in parameters[1:] if p.name != "clip"}


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(
        build=ddpm,
        order=1,
        evaluations_per_step=1,
        stochastic=True,
        recommended_steps=1000,
        source="Ho et al., arXiv 2006.11239 Algorithm 2",
    ),
    "ddim": Sampler(
        build=ddim,
        order=1,
        evaluations_per_step=1,
        stochastic=False,
        recommended_steps=50,
        source="Song et al., arXiv 2010.02502 eq. 12 and 16",
    ),
}


def build_program(
    sampler: str,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    spacing: str = "leading",
    clip: float = 1.0,
    **options: Any,
) -> SamplerProgram:
    """Compile a sampler for a network trained on a schedule.

    Args:
        sampler: one of :data:`SAMPLERS`.
        schedule: the schedule the network was trained on.
        prediction_type: what the network predicts ("epsilon", "sample", "v_prediction").
        num_inference_steps: S, in [1, T].
        spacing: which timesteps to visit, one of :data:`~ddpm_runtime.schedule.SPACINGS`.
        clip: bound of x_0; infinity for no clipping.
        **options: the sampler's own (``eta``, ``variance``, ...).

    Raises:
        ConfigurationError: unknown name or option, or a value out of range.
    """
    chosen = SAMPLERS[choose("sampler", sampler, SAMPLERS)]
    for option in options:
        choose(f"option of the {sampler} sampler", option, chosen.options)
    timesteps = timestep_spacing(spacing, schedule.num_train_timesteps, num_inference_steps)
    trajectory = discrete_trajectory(schedule, prediction_type, timesteps)
    return chosen.build(trajectory, clip=clip, **options)
