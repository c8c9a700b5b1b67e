"""Which timesteps a sampler visits.

Nothing here or elsewhere does arithmetic on a timestep to find "the previous one": a sampler walks
consecutive entries of the array that :func:`timestep_spacing` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, choose

if TYPE_CHECKING:
    from .schedule import NoiseSchedule

__all__ = ["SPACINGS", "karras_sigmas", "timestep_spacing"]

Array = NDArray[np.float64]


def timestep_spacing(
    name: str,
    num_train_timesteps: int,
    num_inference_steps: int,
    schedule: NoiseSchedule | None = None,
) -> Array:
    """The timesteps a sampler visits, highest noise first.

    With T training timesteps and S inference steps:

        leading    multiples of ⌊T/S⌋ from 0             Lin et al., arXiv 2305.08891 Table 2
        trailing   the end of each of S equal spans       the same; the one for zero terminal SNR
        linspace   S points over 0 … T−1, ends included   the same
        quadratic  ⌊c·i²⌋ up to 0.8·T                     Song et al., arXiv 2010.02502 app. D.2
        karras     σ^(1/7) equally spaced, fractional     Karras et al., arXiv 2206.00364 eq. 5
        log_snr    log-SNR equally spaced, fractional     Lu et al., arXiv 2206.00927 §3.4

    Args:
        name: one of :data:`SPACINGS`.
        num_train_timesteps: T.
        num_inference_steps: S, 1 ≤ S ≤ T.
        schedule: the noise levels; "karras" and "log_snr" need them.

    Returns:
        (S,) float64, strictly decreasing in [0, T−1]; whole numbers for the first four.

    Raises:
        ConfigurationError: unknown name, S outside [1, T], or no schedule where one is needed.
    """
    choose("timestep spacing", name, SPACINGS)
    T, S = num_train_timesteps, num_inference_steps
    if not 1 <= S <= T:
        raise ConfigurationError(
            f"steps must be between 1 and {T}, the timesteps this network was trained on; got {S}. "
            f"The nearest valid choice is {min(max(S, 1), T)}."
        )
    return SPACINGS[name](T, S, schedule)


def karras_sigmas(
    steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Array:
    """Noise levels whose ρ-th roots are equally spaced.

    Source: Karras et al. (EDM), arXiv 2206.00364 eq. 5 (without its last level, 0).

    Args:
        steps: S ≥ 1.
        sigma_min: the last level, > 0.
        sigma_max: the first level.
        rho: 7 in the paper; larger values put more levels near the end.

    Returns:
        (S,) float64, falling from sigma_max to sigma_min; (sigma_max,) for one step.

    Raises:
        ConfigurationError: steps < 1, or not 0 < sigma_min < sigma_max, or rho ≤ 0.
    """
    if steps < 1:
        raise ConfigurationError(f"steps must be ≥ 1; got {steps}.")
    if not (0.0 < sigma_min <= sigma_max and rho > 0.0):
        raise ConfigurationError(
            "Karras noise levels need 0 < sigma_min ≤ sigma_max and rho > 0; "
            f"got sigma_min={sigma_min!r}, sigma_max={sigma_max!r}, rho={rho!r}."
        )
    ramp = np.linspace(0.0, 1.0, steps)
    root_max, root_min = sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho)
    return np.asarray((root_max + ramp * (root_min - root_max)) ** rho, dtype=np.float64)


def _leading(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """Multiples of ⌊T/S⌋, from 0."""
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (T // steps)


def _trailing(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """The last timestep of each of S equal spans of T."""
    # like the field's code to the bit, whose running sum breaks ties of rounding now up, now down
    # and sometimes runs one step too far
    return np.round(np.arange(T, 0, -T / steps))[:steps] - 1


def _linspace(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """S points over 0 … T−1, both ends included."""
    return np.round(np.linspace(0, T - 1, steps))[::-1] if steps > 1 else np.array([T - 1.0])


def _quadratic(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """⌊c·i²⌋ up to 0.8·T, as the authors' code of DDIM (arXiv 2010.02502 appendix D.2) has it.

    Where that repeats a timestep (many steps) the next free one is taken.
    """
    if steps == 1:
        return np.array([np.floor(0.8 * T)])
    rising = np.floor(np.linspace(0.0, np.sqrt(0.8 * T), steps) ** 2)
    steps_taken = np.arange(steps, dtype=np.float64)
    return np.asarray(np.maximum.accumulate(rising - steps_taken) + steps_taken)[::-1]


def _karras(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """Noise-to-signal ratios of Karras et al., ρ = 7; timesteps are fractional."""
    return _ramp(
        T,
        steps,
        schedule,
        lambda log_min, log_max, n: np.log(karras_sigmas(n, np.exp(log_min), np.exp(log_max))),
    )


def _log_snr(T: int, steps: int, schedule: NoiseSchedule | None) -> Array:
    """Equal steps of log-SNR (DPM-Solver, arXiv 2206.00927 §3.4); timesteps are fractional."""
    return _ramp(T, steps, schedule, lambda log_min, log_max, n: np.linspace(log_max, log_min, n))


def _ramp(
    T: int,
    steps: int,
    schedule: NoiseSchedule | None,
    ramp: Callable[[float, float, int], Array],
) -> Array:
    """Timesteps at the noise levels of a ramp over the schedule's whole range.

    A schedule with zero terminal SNR has no largest noise-to-signal ratio: its last timestep takes
    the place of the first level of the ramp.
    """
    if schedule is None:
        raise ConfigurationError(
            "the karras and log_snr spacings depend on the noise levels; pass schedule=."
        )
    endless = np.isinf(schedule.log_sigmas)
    finite = schedule.log_sigmas[~endless]
    timesteps = schedule.timesteps_at(ramp(float(finite[0]), float(finite[-1]), steps))
    if endless[-1]:
        timesteps[0] = T - 1
    return timesteps


SPACINGS: dict[str, Callable[[int, int, NoiseSchedule | None], Array]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quadratic": _quadratic,
    "karras": _karras,
    "log_snr": _log_snr,
}
