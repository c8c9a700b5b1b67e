"""The forward process and the training loss of Ho et al. (DDPM, arXiv 2006.11239).

    x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε          eq. 4
    loss = E ‖ target − network(x_t, t) ‖²       eq. 14 ("L_simple"), target = ε

and its two other parameterisations. √ᾱ and √(1 − ᾱ) come from :mod:`ddpm_runtime.trajectory`
(float64, the only place that computes them) and are cast to float32 once, here.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddpm_runtime.errors import choose
from ddpm_runtime.schedule import NoiseSchedule
from ddpm_runtime.trajectory import discrete_trajectory

from .config import LOSSES

__all__ = ["ForwardProcess", "training_loss"]


class ForwardProcess:
    """q(x_t | x_0) on one device, and what the network should answer for its samples.

    Args:
        schedule: the noise levels.
        prediction_type: one of ``ddpm_runtime.trajectory.PREDICTION_TYPES``.
        device: where the tables live.

    Raises:
        ConfigurationError: unknown prediction type, or "epsilon" where no signal is left.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_train_timesteps = schedule.num_train_timesteps
        self.prediction_type = prediction_type
        falling = np.arange(schedule.num_train_timesteps - 1, -1, -1, dtype=np.float64)
        levels = discrete_trajectory(schedule, prediction_type, falling)
        # a trajectory falls to the clean image, one level more; the tables rise with t
        self._signal, self._noise = (
            torch.tensor(level[-2::-1].copy(), dtype=torch.float32, device=device)
            for level in (levels.signal, levels.noise)
        )

    def noised(self, x_0: Tensor, timesteps: Tensor, epsilon: Tensor) -> Tensor:
        """x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε.

        Args:
            x_0: (N, C, H, W) float32 in [−1, 1].
            timesteps: (N,) int64 in [0, T − 1].
            epsilon: (N, C, H, W) float32, standard normal.

        Returns:
            (N, C, H, W) float32.

        Source: Ho et al., arXiv 2006.11239 eq. 4.
        """
        signal, noise = self._levels(timesteps)
        return signal * x_0 + noise * epsilon

    def target(self, x_0: Tensor, timesteps: Tensor, epsilon: Tensor) -> Tensor:
        """What the network should answer for x_t.

        "epsilon": ε. "sample": x_0. "v_prediction": v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0.

        Args:
            x_0: as for :meth:`noised`.
            timesteps: as for :meth:`noised`.
            epsilon: as for :meth:`noised`.

        Returns:
            (N, C, H, W) float32.

        Source: Salimans & Ho, arXiv 2202.00512 §4 and appendix D (v).
        """
        if self.prediction_type == "epsilon":
            return epsilon
        if self.prediction_type == "sample":
            return x_0
        signal, noise = self._levels(timesteps)
        return signal * epsilon - noise * x_0

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ_t, √(1 − ᾱ_t)), each (N, 1, 1, 1)."""
        shape = (-1, 1, 1, 1)
        return self._signal[timesteps].reshape(shape), self._noise[timesteps].reshape(shape)


def training_loss(
    loss: str, prediction: Tensor, target: Tensor, huber_delta: float = 1.0
) -> Tensor:
    """The mean distance between prediction and target, computed in float32.

    With d = prediction − target: "l2" d²; "l1" |d|; "huber" d²/2 where |d| ≤ δ, else
    δ·(|d| − δ/2).

    Args:
        loss: one of ``LOSSES``.
        prediction: (N, C, H, W), any float dtype.
        target: (N, C, H, W) float32.
        huber_delta: δ > 0.

    Returns:
        () float32, the mean over every element.

    Source: Ho et al., arXiv 2006.11239 eq. 14; Huber, 1964 (the third).
    """
    choose("loss", loss, LOSSES)
    prediction = prediction.float()
    if loss == "l2":
        return functional.mse_loss(prediction, target)
    if loss == "l1":
        return functional.l1_loss(prediction, target)
    return functional.huber_loss(prediction, target, delta=huber_delta)
