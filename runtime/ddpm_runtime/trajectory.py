"""The noise levels a sampler visits, and what the network's answer means at each of them.

A level is a pair (signal, noise): x_t = signal · x_0 + noise · ε with ε ~ N(0, I). For a DDPM
schedule signal = √ᾱ_t and noise = √(1 − ᾱ_t), so signal² + noise² = 1; an EDM network keeps
signal = 1. Samplers are written once over levels and never ask which family they serve.

The network's answer m becomes a clean image by two numbers a level:

    x_0 = x0_from_x · x_t + x0_from_m · m
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError, choose
from .schedule import NoiseSchedule

__all__ = ["PREDICTION_TYPES", "Trajectory", "discrete_trajectory"]

Array = NDArray[np.float64]


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
    """

    timesteps: Array
    signal: Array
    noise: Array
    input_scale: Array
    x0_from_x: Array
    x0_from_m: Array
    initial_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)


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
        timesteps: (S,) strictly decreasing whole numbers in [0, T−1].

    Raises:
        ConfigurationError: unknown prediction type; timesteps that are not such numbers; an
            epsilon network asked to start where no signal is left (ᾱ = 0).
    """
    choose("prediction type", prediction_type, PREDICTION_TYPES)
    timesteps = np.asarray(timesteps, dtype=np.float64)
    last = schedule.num_train_timesteps - 1
    whole = timesteps.astype(np.int64)
    valid = timesteps.ndim == 1 and timesteps.size > 0 and bool((whole == timesteps).all())
    if not (valid and whole.min() >= 0 and whole.max() <= last and (np.diff(whole) < 0).all()):
        raise ConfigurationError(
            f"timesteps must be strictly decreasing whole numbers in [0, {last}]; "
            f"got {timesteps.tolist()[:8]}{' …' if timesteps.size > 8 else ''}."
        )
    alphas_cumprod = np.append(schedule.alphas_cumprod[whole], 1.0)
    signal, noise = np.sqrt(alphas_cumprod), np.sqrt(1.0 - alphas_cumprod)
    if prediction_type == "epsilon" and signal.min() == 0.0:
        raise ConfigurationError(
            "an epsilon network says nothing about the image where no signal is left (zero "
            "terminal SNR); use a network trained with v_prediction or sample prediction."
        )
    x0_from_x, x0_from_m = PREDICTION_TYPES[prediction_type](signal[:-1], noise[:-1])
    return Trajectory(
        timesteps=timesteps,
        signal=signal,
        noise=noise,
        input_scale=np.ones_like(timesteps),
        x0_from_x=x0_from_x,
        x0_from_m=x0_from_m,
    )
