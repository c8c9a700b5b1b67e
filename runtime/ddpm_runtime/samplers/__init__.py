"""Every sampler by name: what it is, and the function that compiles it.

A sampler is a function ``(trajectory, *, clip, **options) -> SamplerProgram``. Adding one is adding
a file with such a function and an entry to :data:`SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from ..errors import ConfigurationError
from ..program import SamplerProgram
from ..schedule import NoiseSchedule, timestep_spacing
from ..trajectory import Trajectory, discrete_trajectory
from .aliases import ALIASES, resolve_alias, spelling
from .ddim import ddim
from .ddpm import ddpm
from .dpm_solver_multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m
from .dpm_solver_singlestep import dpm_solver_2s, dpm_solver_3s, dpmpp_2s, dpmpp_3s
from .euler import euler, euler_ancestral
from .heun import heun
from .langevin import langevin, predictor_corrector
from .options import check_options, choices_of, defaults_of
from .pndm import ipndm, plms
from .repaint import repaint
from .unipc import unipc

__all__ = [
    "ALIASES",
    "SAMPLERS",
    "Sampler",
    "build_program",
    "compile_program",
    "resolve_sampler",
]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """What a user may want to know before choosing.

    Args:
        build: compiles the program.
        order: order of convergence in the step size, with its default options.
        evaluations_per_step: network evaluations a step.
        stochastic: whether it draws noise (with its default options).
        recommended_steps: a good number of steps to start from.
        recommended_spacing: the spacing that suits it. Solvers that extrapolate want equal steps
            of log-SNR: the last of 20 "leading" steps spans 30 % of it, and on a Gaussian mixture
            dpmpp_2m then has 20 times the error it has on "log_snr". Not so ipndm and plms, whose
            weights are those of equal steps of t: with 20 on the shipped network, Fréchet distance
            0.46 on "leading", 1.1 on "log_snr"; heun with 10: 2.8 and 0.46 (400 images each).
        source: paper, arXiv id, equation.
    """

    build: Callable[..., SamplerProgram]
    order: int
    evaluations_per_step: int
    stochastic: bool
    recommended_steps: int
    source: str
    recommended_spacing: str = "leading"

    @property
    def options(self) -> dict[str, Any]:
        """Options of this sampler and their defaults."""
        return defaults_of(self.build)

    @property
    def choices(self) -> dict[str, tuple[Any, ...]]:
        """The possible values of those options that have a list of them."""
        return choices_of(self.build)


def _entry(
    build: Callable[..., SamplerProgram],
    order: int,
    evaluations_per_step: int,
    recommended_steps: int,
    source: str,
    *,
    stochastic: bool = False,
    spacing: str = "leading",
) -> Sampler:
    return Sampler(
        build=build,
        order=order,
        evaluations_per_step=evaluations_per_step,
        stochastic=stochastic,
        recommended_steps=recommended_steps,
        recommended_spacing=spacing,
        source=source,
    )


SAMPLERS: dict[str, Sampler] = {
    "ddpm": _entry(ddpm, 1, 1, 1000, "Ho et al., arXiv 2006.11239 Algorithm 2", stochastic=True),
    "ddim": _entry(ddim, 1, 1, 50, "Song et al., arXiv 2010.02502 eq. 12 and 16"),
    "euler": _entry(euler, 1, 1, 50, "Karras et al., arXiv 2206.00364 Algorithm 1, first order"),
    "euler_ancestral": _entry(
        euler_ancestral, 1, 1, 100, "k-diffusion, sample_euler_ancestral", stochastic=True
    ),
    "heun": _entry(
        heun, 2, 2, 18, "Karras et al., arXiv 2206.00364 Algorithm 1", spacing="log_snr"
    ),
    "dpmpp_2m": _entry(
        dpmpp_2m, 2, 1, 20, "Lu et al., arXiv 2211.01095 Algorithm 2", spacing="log_snr"
    ),
    "dpmpp_3m": _entry(
        dpmpp_3m, 3, 1, 20, "Lu et al., arXiv 2211.01095 and the authors' code", spacing="log_snr"
    ),
    "dpmpp_2m_sde": _entry(
        dpmpp_2m_sde,
        2,
        1,
        30,
        "Lu et al., arXiv 2211.01095 eq. 19",
        stochastic=True,
        spacing="log_snr",
    ),
    "dpmpp_2s": _entry(
        dpmpp_2s, 2, 2, 10, "Lu et al., arXiv 2211.01095 Algorithm 1", spacing="log_snr"
    ),
    "dpmpp_3s": _entry(
        dpmpp_3s, 3, 3, 8, "Lu et al., arXiv 2211.01095 and the authors' code", spacing="log_snr"
    ),
    "dpm_solver_2s": _entry(
        dpm_solver_2s, 2, 2, 10, "Lu et al., arXiv 2206.00927 Algorithm 1", spacing="log_snr"
    ),
    "dpm_solver_3s": _entry(
        dpm_solver_3s, 3, 3, 8, "Lu et al., arXiv 2206.00927 Algorithm 2", spacing="log_snr"
    ),
    "unipc": _entry(
        unipc, 3, 1, 15, "Zhao et al., arXiv 2302.04867 Algorithms 1 and 2", spacing="log_snr"
    ),
    "ipndm": _entry(ipndm, 2, 1, 15, "Zhang & Chen, arXiv 2204.13902 appendix B"),
    "plms": _entry(plms, 2, 1, 25, "Liu et al., arXiv 2202.09778 eq. 9 and 12"),
    "langevin": _entry(
        langevin,
        1,
        5,
        200,
        "Song & Ermon, arXiv 1907.05600 Algorithm 1",
        stochastic=True,
        spacing="log_snr",
    ),
    "repaint": _entry(
        repaint, 1, 10, 100, "Lugmayr et al., arXiv 2201.09865 Algorithm 1", stochastic=True
    ),
    "predictor_corrector": _entry(
        predictor_corrector, 1, 2, 500, "Song et al., arXiv 2011.13456 Algorithm 1", stochastic=True
    ),
}


def resolve_sampler(name: str) -> tuple[str, dict[str, Any]]:
    """The sampler behind a name, whichever library the user knows it from.

    Args:
        name: one of :data:`SAMPLERS` or :data:`ALIASES`, in any spelling.

    Returns:
        Our name, and the options the alias implies.

    Raises:
        ConfigurationError: unknown name; the message has the nearest.
    """
    own = {spelling(sampler): sampler for sampler in SAMPLERS}.get(spelling(name))
    found = (own, {}) if own else resolve_alias(name)
    if found:
        return found
    near = get_close_matches(name, [*SAMPLERS, *ALIASES], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigurationError(
        f"unknown sampler {name!r}; possible: {', '.join(sorted(SAMPLERS))}, and the names "
        f"diffusers and k-diffusion have for them.{hint}"
    )


def compile_program(
    sampler: str, trajectory: Trajectory, *, clip: float = 1.0, **options: Any
) -> SamplerProgram:
    """Compile a sampler over any trajectory: of a DDPM schedule, of an EDM network, or hand-made.

    Args:
        sampler: one of :data:`SAMPLERS`, or an alias of one.
        trajectory: the levels to visit.
        clip: bound of x_0; infinity for no clipping.
        **options: the sampler's own (``eta``, ``variance``, ``order``, ...).

    Raises:
        ConfigurationError: unknown name or option, or a value out of range.
    """
    name, implied = resolve_sampler(sampler)
    chosen = SAMPLERS[name]
    check_options(name, chosen.build, options)
    return chosen.build(trajectory, clip=clip, **{**implied, **options})


def build_program(
    sampler: str,
    *,
    schedule: NoiseSchedule,
    prediction_type: str,
    num_inference_steps: int,
    spacing: str = "leading",
    strength: float = 1.0,
    clip: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    **options: Any,
) -> SamplerProgram:
    """Compile a sampler for a network trained on a schedule.

    Args:
        sampler: one of :data:`SAMPLERS`, or an alias of one.
        schedule: the schedule the network was trained on.
        prediction_type: what the network predicts ("epsilon", "sample", "v_prediction").
        num_inference_steps: S, in [1, T]; samplers with several evaluations a step have more rows.
        spacing: which timesteps to visit, one of :data:`~ddpm_runtime.spacing.SPACINGS`.
        strength: share of the steps to run, the last ones, in (0, 1]; below 1 the program starts
            from a noisy image instead of noise (Meng et al., SDEdit, arXiv 2108.01073).
        clip: bound of x_0; infinity for no clipping.
        guidance_interval: (lowest, highest) timestep at which classifier-free guidance acts; None
            means everywhere (Kynkäänniemi et al., arXiv 2404.07724).
        **options: the sampler's own (``eta``, ``variance``, ...).

    Raises:
        ConfigurationError: unknown name or option, or a value out of range.
    """
    resolve_sampler(sampler)  # a wrong name is the first thing to say
    timesteps = timestep_spacing(
        spacing, schedule.num_train_timesteps, num_inference_steps, schedule
    )
    kept = timesteps[-_steps_kept(strength, len(timesteps)) :]
    trajectory = discrete_trajectory(schedule, prediction_type, kept)
    program = compile_program(sampler, trajectory, clip=clip, **options)
    if guidance_interval is None:
        return program
    lowest, highest = guidance_interval
    if not 0 <= lowest <= highest:
        raise ConfigurationError(
            f"guidance_interval must be two timesteps, lowest first; got {guidance_interval}."
        )
    guided = (program.timesteps >= lowest) & (program.timesteps <= highest)
    return replace(program, guided=guided)


def _steps_kept(strength: float, steps: int) -> int:
    if not 0.0 < strength <= 1.0:
        raise ConfigurationError(
            f"strength must lie in (0, 1] (1 starts from pure noise); got {strength}. "
            f"The nearest valid choice is {1.0 if strength > 1 else 1 / steps:g}."
        )
    return max(1, round(strength * steps))
