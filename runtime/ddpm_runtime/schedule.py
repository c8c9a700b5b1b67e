"""How noise grows: betas and alphas_cumprod (which timesteps to visit: ``spacing.py``).

The forward process of Ho et al. (DDPM, arXiv 2006.11239) eq. 4:

    q(x_t | x_0) = N( √ᾱ_t · x_0 , (1 − ᾱ_t) · I ),      ᾱ_t = Π_{s ≤ t} (1 − β_s)

with t = 0 … T−1 here (the paper counts from 1). Everything is NumPy float64.

Timesteps may be fractional. Between two whole ones log σ is linear, σ = √((1 − ᾱ)/ᾱ), as in
k-diffusion and diffusers; at a whole one ᾱ is the schedule's own, to the last bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, choose
from .spacing import SPACINGS, karras_sigmas, timestep_spacing

__all__ = [
    "SCHEDULES",
    "SPACINGS",
    "NoiseSchedule",
    "betas_from_file",
    "karras_sigmas",
    "make_schedule",
    "rescaled_to_zero_terminal_snr",
    "timestep_spacing",
]

Array = NDArray[np.float64]

_MAX_BETA = 0.999  # Nichol & Dhariwal (arXiv 2102.09672) §3.2: clip to avoid a singular last step
_MIN_BETA = 1e-8  # leaves a trace in float64
_MAX_FILE_BYTES = 1 << 24  # a file of betas; a million of them fit


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise level at every training timestep.

    Args:
        betas: (T,) float64, each in (0, 1); β_t of DDPM eq. 2. The last may be 1 (zero terminal
            SNR).
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
            raise ConfigurationError(
                f"betas must be a vector of length ≥ 1; got shape {betas.shape}."
            )
        inside = (betas > 0) & (betas < 1)
        inside[-1] |= betas[-1] == 1.0
        if not inside.all():
            at = int(np.argmin(inside))
            raise ConfigurationError(
                f"every beta must lie in (0, 1); betas[{at}] is {float(betas[at])!r}. "
                f"The nearest valid choice is {_MAX_BETA if betas[at] >= 1 else _MIN_BETA:g}: "
                "choose other ends, or rescale the schedule."
            )
        betas.flags.writeable = False
        alphas_cumprod = np.cumprod(1.0 - betas)
        if alphas_cumprod[0] == 1.0:
            raise ConfigurationError(
                f"betas[0] is {betas[0]!r}, too small to add any noise in float64. "
                "Choose larger betas, or fewer timesteps of a geometric schedule."
            )
        alphas_cumprod.flags.writeable = False
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "alphas_cumprod", alphas_cumprod)

    @property
    def num_train_timesteps(self) -> int:
        """T, the number of noise levels the network was trained on."""
        return len(self.betas)

    @cached_property
    def log_sigmas(self) -> Array:
        """(T,) log of σ_t = √((1 − ᾱ_t)/ᾱ_t), rising; infinite where no signal is left."""
        with np.errstate(divide="ignore"):
            levels = 0.5 * (np.log1p(-self.alphas_cumprod) - np.log(self.alphas_cumprod))
        return np.asarray(levels, dtype=np.float64)

    def alphas_cumprod_at(self, timesteps: Array) -> Array:
        """ᾱ at timesteps that may be fractional.

        Args:
            timesteps: (n,) in [0, T−1]; none strictly between a level and one without signal.
        """
        below = np.floor(timesteps).astype(np.int64)
        alphas_cumprod = self.alphas_cumprod[below]
        between = timesteps != below
        log_sigmas = np.interp(timesteps[between], *self._finite_levels)
        alphas_cumprod[between] = 1.0 / (1.0 + np.exp(2.0 * log_sigmas))
        return alphas_cumprod

    def timesteps_at(self, log_sigmas: Array) -> Array:
        """The inverse of log σ: fractional timesteps with these noise-to-signal ratios.

        Args:
            log_sigmas: (n,) within those of the schedule; what lies outside is moved to its end.
        """
        timesteps, levels = self._finite_levels
        found = np.asarray(np.interp(log_sigmas, levels, timesteps))
        whole = np.round(found)
        # rounding errors of a ramp must not turn a trained timestep into a fractional one
        return np.where(np.abs(found - whole) < 1e-9, whole, found)

    @property
    def _finite_levels(self) -> tuple[Array, Array]:
        """Timesteps with signal left, and their log σ."""
        finite = np.flatnonzero(np.isfinite(self.log_sigmas))
        return finite.astype(np.float64), self.log_sigmas[finite]


# --- families of betas -------------------------------------------------------------------------


def _linear(T: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Array:
    """Equally spaced betas. Source: Ho et al., arXiv 2006.11239 §4."""
    return np.linspace(beta_start, beta_end, T, dtype=np.float64)


def _scaled_linear(T: int, beta_start: float = 0.00085, beta_end: float = 0.012) -> Array:
    """Equally spaced √β. Source: Rombach et al., arXiv 2112.10752 (the released configuration)."""
    roots = np.linspace(beta_start**0.5, beta_end**0.5, T, dtype=np.float64)
    return np.square(roots)


def _cosine(T: int, offset: float = 0.008) -> Array:
    """ᾱ follows a squared cosine. Source: Nichol & Dhariwal, arXiv 2102.09672 eq. 17."""
    u = np.arange(T + 1, dtype=np.float64) / T
    return _betas_of(np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2)


def _sigmoid(T: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> Array:
    """ᾱ follows a falling sigmoid. Source: Jabri et al. (RIN), arXiv 2212.11972, Algorithm 1."""
    u = np.arange(T + 1, dtype=np.float64) / T
    logistic = 1.0 / (1.0 + np.exp(-(u * (end - start) + start) / tau))
    return _betas_of(logistic[-1] - logistic)  # ratios only: what scales ᾱ_0 to 1 cancels


def _geometric(T: int, beta: float = 0.02) -> Array:
    """β_t = β·(1 − β)^(T−1−t): each step adds the same share of what noise is still to come.

    The betas are a geometric series that ends at ``beta``; T must be small enough for 1 − β_0 < 1
    in float64 (about 1,650 for the default).
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
    return _betas_of(np.concatenate([[1.0], alphas_cumprod]), largest=1.0)


def _betas_of(alphas_cumprod: Array, largest: float = _MAX_BETA) -> Array:
    """β_t = 1 − ᾱ_t / ᾱ_{t−1}, for T + 1 values of ᾱ that start before the first timestep."""
    betas = np.minimum(1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1], largest)
    return np.asarray(betas, dtype=np.float64)


SCHEDULES: dict[str, Callable[..., Array]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "cosine": _cosine,
    "sigmoid": _sigmoid,
    "geometric": _geometric,
    "geometric_sigmas": _geometric_sigmas,
}


def make_schedule(
    name: str = "linear",
    num_train_timesteps: int = 1000,
    *,
    rescale_zero_terminal_snr: bool = False,
    **options: Any,
) -> NoiseSchedule:
    """Make a schedule by name.

    Args:
        name: one of :data:`SCHEDULES`, or "custom" with ``betas=[...]`` (see
            :func:`betas_from_file`).
        num_train_timesteps: T ≥ 1.
        rescale_zero_terminal_snr: end without any signal, see
            :func:`rescaled_to_zero_terminal_snr`; needs a v_prediction or sample network.
        **options: the named family's own parameters (``beta_start``, ``offset``, ...).

    Returns:
        The schedule; its ``spec`` holds exactly these arguments.

    Raises:
        ConfigurationError: unknown name or option, T < 1, or betas outside (0, 1).
    """
    choose("schedule", name, [*SCHEDULES, "custom"])
    if num_train_timesteps < 1:
        raise ConfigurationError(f"num_train_timesteps must be ≥ 1; got {num_train_timesteps}.")
    if name == "custom":
        betas = _custom(num_train_timesteps, options)
        options = {"betas": betas.tolist()}
    else:
        family = SCHEDULES[name]
        possible = family.__code__.co_varnames[1 : family.__code__.co_argcount]
        for option in options:
            choose(f"option of the {name} schedule", option, possible)
        betas = family(num_train_timesteps, **options)
    spec = {"name": name, "num_train_timesteps": num_train_timesteps, **options}
    schedule = NoiseSchedule(betas, spec)
    if rescale_zero_terminal_snr:
        spec["rescale_zero_terminal_snr"] = True
        schedule = NoiseSchedule(rescaled_to_zero_terminal_snr(schedule.alphas_cumprod), spec)
    return schedule


def rescaled_to_zero_terminal_snr(alphas_cumprod: Array) -> Array:
    """Shift and stretch √ᾱ so that the last is 0 and the first stays.

    Source: Lin et al., arXiv 2305.08891 Algorithm 1.

    Args:
        alphas_cumprod: (T,) falling.

    Returns:
        (T,) betas; the last is exactly 1.

    Raises:
        ConfigurationError: fewer than two timesteps.
    """
    if len(alphas_cumprod) < 2:
        raise ConfigurationError(
            "rescaling to zero terminal SNR keeps the first noise level and moves the last, so it "
            f"needs num_train_timesteps ≥ 2; got {len(alphas_cumprod)}."
        )
    signal = np.sqrt(alphas_cumprod)
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return _betas_of(np.concatenate([[1.0], signal**2]), largest=1.0)


def betas_from_file(path: str | PathLike[str]) -> Array:
    """Read betas from a file, for ``make_schedule("custom", len(betas), betas=betas)``.

    Args:
        path: ``.npy`` (a vector; never unpickled) or ``.json`` (a list of numbers, or an object
            with such a list under "betas").

    Returns:
        (T,) float64, not yet checked to lie in (0, 1).

    Raises:
        ConfigurationError: no such file, another suffix, or not a vector of numbers.
    """
    path = Path(path)
    if path.suffix not in {".json", ".npy"}:
        raise ConfigurationError(f"betas are read from .json or .npy files; got {path.name!r}.")
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ConfigurationError(
                f"{path} is larger than {_MAX_FILE_BYTES} bytes; a file of betas is not."
            )
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
        else:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found.get("betas") if isinstance(found, dict) else found
        betas = np.asarray(found)
        if betas.ndim != 1 or betas.dtype.kind not in "fiu":
            raise ValueError(f"found {betas.dtype} of shape {betas.shape}")
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{path} does not hold a vector of betas ({error}). Save one with "
            "numpy.save(path, betas), or as a JSON list of numbers."
        ) from error
    return betas.astype(np.float64)


def _custom(T: int, options: dict[str, Any]) -> Array:
    betas = np.asarray(options.get("betas", ()), dtype=np.float64)
    unknown = sorted(set(options) - {"betas"})
    if betas.size != T or unknown:
        raise ConfigurationError(
            f"a custom schedule takes betas alone, one per timestep; got {betas.size} betas "
            f"for num_train_timesteps={T} and {unknown}."
        )
    return betas
