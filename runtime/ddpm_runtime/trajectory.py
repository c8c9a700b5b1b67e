"""The noise levels a sampler visits, and what the network's answer means at each of them.

A level is a pair (signal, noise): x_t = signal · x_0 + noise · ε with ε ~ N(0, I). For a DDPM
schedule signal = √ᾱ_t and noise = √(1 − ᾱ_t), so signal² + noise² = 1; an EDM network keeps
signal = 1. Samplers are written once over levels and never ask which family they serve.

The network's answer m becomes a clean image by two numbers a level:

    x_0 = x0_from_x · x_t + x0_from_m · m
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, choose
from .schedule import NoiseSchedule

__all__ = [
    "PREDICTION_TYPES",
    "Evaluations",
    "Trajectory",
    "discrete_trajectory",
    "edm_trajectory",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluations:
    """The network at n noise levels: the columns of :class:`Trajectory`, all of shape (n,)."""

    timesteps: Array
    signal: Array
    noise: Array
    input_scale: Array
    x0_from_x: Array
    x0_from_m: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectory:
    """S network evaluations and the level each starts from; one more level where the last ends.

    Args:
        timesteps: (S,) what the network is told, highest noise first.
        signal: (S + 1,) signal level before each step, and after the last.
        noise: (S + 1,) noise level likewise.
        input_scale: (S,) what x_t is multiplied by before the network sees it.
        x0_from_x: (S,) see the module.
        x0_from_m: (S,) see the module.
        initial_scale: standard deviation of the starting noise x_T.
        at_log_snr: the same network at any levels between, given log(signal / noise); None where
            it is not known, and then solvers that look between levels refuse.
    """

    timesteps: Array
    signal: Array
    noise: Array
    input_scale: Array
    x0_from_x: Array
    x0_from_m: Array
    initial_scale: float = 1.0
    at_log_snr: Callable[[Array], Evaluations] | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def log_snr(self) -> Array:
        """(S + 1,) λ = log(signal / noise), rising; −∞ without signal, +∞ without noise."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.signal) - np.log(self.noise))

    def take(self, levels: Sequence[int] | NDArray[np.int64]) -> Trajectory:
        """The trajectory that visits these levels in this order, then ends where this one ends.

        Args:
            levels: indices in [0, S); a solver that evaluates twice at a level repeats it.
        """
        levels = np.asarray(levels, dtype=np.int64)
        return replace(
            self,
            timesteps=self.timesteps[levels],
            signal=np.append(self.signal[levels], self.signal[-1]),
            noise=np.append(self.noise[levels], self.noise[-1]),
            input_scale=self.input_scale[levels],
            x0_from_x=self.x0_from_x[levels],
            x0_from_m=self.x0_from_m[levels],
        )

    def refine(self, fractions: Sequence[float]) -> Trajectory:
        """Visit levels inside each step too, at these fractions of it in log-SNR.

        A step that starts without signal or ends without noise has infinite length in log-SNR
        and stays whole.

        Args:
            fractions: rising, strictly between 0 and 1.

        Raises:
            ConfigurationError: this trajectory does not know the network between its levels.
        """
        if self.at_log_snr is None:
            raise ConfigurationError(
                "this sampler evaluates the network between the levels of the trajectory, which "
                "does not know it there; pass at_log_snr, or choose a multistep sampler."
            )
        lengths = np.diff(self.log_snr)
        split = np.flatnonzero(np.isfinite(lengths))
        inside = self.log_snr[split, None] + lengths[split, None] * np.asarray(fractions)
        between = self.at_log_snr(inside.ravel())
        at = np.repeat(split + 1, len(fractions))

        def merged(name: str) -> Array:
            return np.insert(getattr(self, name), at, getattr(between, name))

        return replace(
            self,
            timesteps=merged("timesteps"),
            signal=merged("signal"),
            noise=merged("noise"),
            input_scale=merged("input_scale"),
            x0_from_x=merged("x0_from_x"),
            x0_from_m=merged("x0_from_m"),
        )


def _epsilon(signal: Array, noise: Array) -> tuple[Array, Array]:
    """x_0 = (x_t − noise·ε) / signal. Source: Ho et al., arXiv 2006.11239 eq. 15."""
    return 1.0 / signal, -noise / signal


def _sample(signal: Array, noise: Array) -> tuple[Array, Array]:
    """The network predicts x_0 itself."""
    return np.zeros_like(signal), np.ones_like(signal)


def _v_prediction(signal: Array, noise: Array) -> tuple[Array, Array]:
    """v = signal·ε − noise·x_0, so x_0 = signal·x_t − noise·v.

    Source: Salimans & Ho, arXiv 2202.00512 appendix D (variance-preserving levels).
    """
    return signal.copy(), -noise


PREDICTION_TYPES: dict[str, Callable[[Array, Array], tuple[Array, Array]]] = {
    "epsilon": _epsilon,
    "sample": _sample,
    "v_prediction": _v_prediction,
}


def discrete_trajectory(
    schedule: NoiseSchedule, prediction_type: str, timesteps: Array
) -> Trajectory:
    """The trajectory of a network trained on a DDPM schedule, ending at the clean image.

    Args:
        schedule: the schedule the network was trained on.
        prediction_type: one of :data:`PREDICTION_TYPES`.
        timesteps: (S,) strictly decreasing numbers in [0, T−1]. Whole ones have the schedule's own
            noise level; between them log σ is linear (see :mod:`~ddpm_runtime.schedule`), and the
            network is told the fraction.

    Raises:
        ConfigurationError: unknown prediction type; timesteps that are not such numbers; an
            epsilon network asked to start where no signal is left (ᾱ = 0).
    """
    choose("prediction type", prediction_type, PREDICTION_TYPES)
    timesteps = _checked_timesteps(schedule, timesteps)

    def evaluations(timesteps: Array) -> Evaluations:
        alphas_cumprod = schedule.alphas_cumprod_at(timesteps)
        signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
        x0_from_x, x0_from_m = PREDICTION_TYPES[prediction_type](signal, noise)
        return Evaluations(
            timesteps=timesteps,
            signal=signal,
            noise=noise,
            input_scale=np.ones_like(timesteps),
            x0_from_x=x0_from_x,
            x0_from_m=x0_from_m,
        )

    if prediction_type == "epsilon" and schedule.alphas_cumprod_at(timesteps).min() == 0.0:
        raise ConfigurationError(
            "an epsilon network says nothing about the image where no signal is left (zero "
            "terminal SNR); use a network trained with v_prediction or sample prediction."
        )
    return _ending_clean(
        evaluations(timesteps),
        at_log_snr=lambda log_snr: evaluations(schedule.timesteps_at(-log_snr)),
    )


def edm_trajectory(sigmas: Array, sigma_data: float = 0.5) -> Trajectory:
    """The trajectory of an EDM-preconditioned network, ending at the clean image.

        x_0 = c_skip · x + c_out · network(c_in · x, c_noise),          x = x_0 + σ · ε

    Source: Karras et al., arXiv 2206.00364 eq. 7 and Table 1 (column "Ours").

    Args:
        sigmas: (S,) strictly decreasing, > 0; see :func:`~ddpm_runtime.schedule.karras_sigmas`.
        sigma_data: standard deviation of the training images, > 0.

    Raises:
        ConfigurationError: sigmas that are not such numbers, or sigma_data ≤ 0.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    valid = sigmas.ndim == 1 and sigmas.size > 0 and bool(np.isfinite(sigmas).all())
    if not (valid and sigmas.min() > 0 and (np.diff(sigmas) < 0).all()):
        raise ConfigurationError(
            f"sigmas must be finite, positive and strictly decreasing; got {_shown(sigmas)}. "
            "The last step to 0 is added by itself."
        )
    if not sigma_data > 0:
        raise ConfigurationError(f"sigma_data must be > 0; got {sigma_data}.")

    def evaluations(sigma: Array) -> Evaluations:
        total = sigma**2 + sigma_data**2
        return Evaluations(
            timesteps=np.log(sigma) / 4.0,
            signal=np.ones_like(sigma),
            noise=sigma,
            input_scale=1.0 / np.sqrt(total),
            x0_from_x=sigma_data**2 / total,
            x0_from_m=sigma * sigma_data / np.sqrt(total),
        )

    return _ending_clean(
        evaluations(sigmas),
        at_log_snr=lambda log_snr: evaluations(np.exp(-log_snr)),
        initial_scale=float(sigmas[0]),
    )


def _ending_clean(
    visited: Evaluations,
    at_log_snr: Callable[[Array], Evaluations],
    initial_scale: float = 1.0,
) -> Trajectory:
    """Add the level where the last step ends: all signal, no noise."""
    return Trajectory(
        timesteps=visited.timesteps,
        signal=np.append(visited.signal, 1.0),
        noise=np.append(visited.noise, 0.0),
        input_scale=visited.input_scale,
        x0_from_x=visited.x0_from_x,
        x0_from_m=visited.x0_from_m,
        initial_scale=initial_scale,
        at_log_snr=at_log_snr,
    )


def _checked_timesteps(schedule: NoiseSchedule, timesteps: Array) -> Array:
    timesteps = np.asarray(timesteps, dtype=np.float64)
    last = schedule.num_train_timesteps - 1
    valid = timesteps.ndim == 1 and timesteps.size > 0 and bool(np.isfinite(timesteps).all())
    if not (
        valid
        and timesteps.min() >= 0
        and timesteps.max() <= last
        and (np.diff(timesteps) < 0).all()
    ):
        raise ConfigurationError(
            f"timesteps must be strictly decreasing numbers in [0, {last}]; "
            f"got {_shown(timesteps)}."
        )
    endless = np.isinf(schedule.log_sigmas[np.ceil(timesteps).astype(np.int64)])
    lost = timesteps[endless & (timesteps != np.round(timesteps))]
    if lost.size:
        raise ConfigurationError(
            f"timestep {lost[0]:g} lies between a noise level and one without signal, where there "
            f"is none to interpolate; the nearest valid choices are {np.floor(lost[0]):g} and "
            f"{np.ceil(lost[0]):g}."
        )
    return timesteps


def _shown(values: Array) -> str:
    return f"{values.tolist()[:8]}{' …' if values.size > 8 else ''}" if values.ndim else f"{values}"
