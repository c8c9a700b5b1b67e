"""How noise grows: betas, alphas_cumprod, and which timesteps a sampler visits.

The forward process of Ho et al. (DDPM, arXiv 2006.11239) eq. 4:

    q(x_t | x_0) = N( √ᾱ_t · x_0 , (1 − ᾱ_t) · I ),      ᾱ_t = Π_{s ≤ t} (1 − β_s)

with t = 0 … T−1 here (the paper counts from 1). Everything is NumPy float64; nothing here does
arithmetic on timesteps to find "the previous one": a sampler walks consecutive entries of the
array that :func:`timestep_spacing` returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, choose

__all__ = ["SCHEDULES", "SPACINGS", "NoiseSchedule", "make_schedule", "timestep_spacing"]

Array = NDArray[np.float64]

_MAX_BETA = 0.999  # Nichol & Dhariwal (arXiv 2102.09672) §3.2: clip to avoid a singular last step


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise level at every training timestep.

    Args:
        betas: (T,) float64, each in (0, 1); β_t of DDPM eq. 2. The last may be 1 (zero terminal SNR).
        spec: how the betas were made, as plain JSON values; ``make_schedule(**spec)`` makes them
            again, bit for bit on the same machine.

    Raises:
        ConfigurationError: betas outside (0, 1), or not a vector.
    """

    betas: Array
    spec: dict[str, Any] = field(default_factory=dict)
    alphas_cumprod: Array = field(init=False)

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or betas.size == 0:
            raise ConfigurationError(f"betas must be a vector of length ≥ 1; got shape {betas.shape}.")
        inside = (betas > 0) & (betas < 1)
        inside[-1] |= betas[-1] == 1.0
        if not inside.all():
            at = int(np.argmin(inside))
            raise ConfigurationError(
                f"every beta must lie in (0, 1); betas[{at}] is {betas[at]!r}. "
                "Choose smaller ends, or rescale the schedule."
            )
        betas.flags.writeable = False
        alphas_cumprod = np.cumprod(1.0 - betas)
        alphas_cumprod.flags.writeable = False
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels the network was trained on."""
        return len(self.betas)


# --- families of betas -------------------------------------------------------------------------


def _linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """Equally spaced betas. Source: Ho et al., arXiv 2006.11239 §4."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def _scaled_linear(T: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Array:
    """Equally spaced √β. Source: Rombach et al., arXiv 2112.10752 (the released configuration)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64) ** 2


def _cosine(T: int, offset: float = 0.008) -> Array:
    """ᾱ follows a squared cosine. Source: Nichol & Dhariwal, arXiv 2102.09672 eq. 17."""
    u = np.arange(T + 1, dtype=np.float64) / T
    signal = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1.0 - signal[1:] / signal[:-1], _MAX_BETA)


def _sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Array:
    """ᾱ follows a falling sigmoid. Source: Jabri et al. (RIN), arXiv 2212.11972, Algorithm 1."""
    u = np.arange(T + 1, dtype=np.float64) / T
    logistic = 1.0 / (1.0 + np.exp(-(u * (end - start) + start) / tau))
    signal = (logistic[-1] - logistic) / (logistic[-1] - logistic[0])
    return np.minimum(1.0 - signal[1:] / signal[:-1], _MAX_BETA)


def _geometric(T: int, beta: float = 0.02) -> Array:
    """β_t = β·(1 − β)^(T−1−t): each step adds the same share of what noise is still to come.

    The betas are a geometric series that ends at ``beta``; T must be large enough for β_0 > 0
    in float64.
    """
    if not 0.0 < beta < 1.0:
        raise ConfigurationError(f"beta must lie in (0, 1); got {beta!r}.")
    return beta * (1.0 - beta) ** np.arange(T - 1, -1, -1, dtype=np.float64)


def _geometric_sigmas(T: int, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Array:
    """Noise-to-signal ratios σ_t = √((1 − ᾱ_t)/ᾱ_t) in a geometric series from min to max.

    Source: Song & Ermon, arXiv 1907.05600 §4.3 (the series of noise levels), brought to the
    variance-preserving form by ᾱ = 1 / (1 + σ²).
    """
    if not 0.0 < sigma_min < sigma_max:
        raise ConfigurationError(
            f"need 0 < sigma_min < sigma_max; got {sigma_min!r} and {sigma_max!r}."
        )
    alphas_cumprod = 1.0 / (1.0 + np.geomspace(sigma_min, sigma_max, T) ** 2)
    return 1.0 - alphas_cumprod / np.concatenate([[1.0], alphas_cumprod[:-1]])


SCHEDULES: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "geometric": _geometric,
    "geometric_sigmas": _geometric_sigmas,
}


def make_schedule(
    name: str = "linear", num_train_timesteps: int = 1000, **options: Any
) -> NoiseSchedule:
    """Make a schedule by name.

    Args:
        name: one of :data:`SCHEDULES`, or "custom" with ``betas=[...]``.
        num_train_timesteps: T ≥ 1.
        **options: the named family's own parameters (``beta_start``, ``offset``, ...).

    Returns:
        The schedule; its ``spec`` holds exactly these arguments.

    Raises:
        ConfigurationError: unknown name or option, T < 1, or betas outside (0, 1).
    """
    choose("schedule", name, [*SCHEDULES, "custom"])
    if num_train_timesteps < 1:
        raise ConfigurationError(f"num_train_timesteps must be ≥ 1; got {num_train_timesteps}.")
    spec = {"name": name, "num_train_timesteps": num_train_timesteps, **options}
    if name == "custom":
        betas = np.asarray(options.pop("betas", ()), dtype=np.float64)
        if len(betas) != num_train_timesteps or options:
            raise ConfigurationError(
                f"a custom schedule takes betas alone, one per timestep; got {len(betas)} betas "
                f"for num_train_timesteps={num_train_timesteps} and {sorted(options)}."
            )
        return NoiseSchedule(betas, spec)
    family = SCHEDULES[name]
    possible = family.__code__.co_varnames[1 : family.__code__.co_argcount]
    for option in options:
        choose(f"option of the {name} schedule", option, possible)
    return NoiseSchedule(family(num_train_timesteps, **options), spec)


# --- which timesteps to visit ------------------------------------------------------------------


def _leading(T: int, steps: int) -> Array:
    return np.arange(steps - 1, -1, -1, dtype=np.float64) * (T // steps)


def _trailing(T: int, steps: int) -> Array:
    return np.round(T - np.arange(steps, dtype=np.float64) * T / steps) - 1


def _linspace(T: int, steps: int) -> Array:
    return np.round(np.linspace(T - 1, 0, steps)) if steps > 1 else np.array([T - 1.0])


SPACINGS: dict[str, Callable[[int, int], Array]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}


def timestep_spacing(name: str, num_train_timesteps: int, num_inference_steps: int) -> Array:
    """The timesteps a sampler visits, highest noise first.

    With T training timesteps and S inference steps (Lin et al., arXiv 2305.08891, Table 2):
    "leading" takes multiples of ⌊T/S⌋ from 0; "trailing" ends every one of S equal spans of T;
    "linspace" spreads S points over 0 … T−1, both ends included.

    Args:
        name: one of :data:`SPACINGS`.
        num_train_timesteps: T.
        num_inference_steps: S, 1 ≤ S ≤ T.

    Returns:
        (S,) float64 of strictly decreasing whole numbers in [0, T−1].

    Raises:
        ConfigurationError: unknown name, or S outside [1, T].
    """
    choose("timestep spacing", name, SPACINGS)
    T, S = num_train_timesteps, num_inference_steps
    if not 1 <= S <= T:
        raise ConfigurationError(
            f"steps must be between 1 and {T}, the timesteps this network was trained on; got {S}. "
            f"The nearest valid choice is {min(max(S, 1), T)}."
        )
    return SPACINGS[name](T, S)
