"""A moving average of the weights: what is sampled from, and what is shipped."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddpm_runtime.errors import CheckpointError

__all__ = ["MovingAverage", "warmed_up_decay"]


def warmed_up_decay(decay: float, update: int) -> float:
    """The decay of update number ``update`` (0, 1, ...): min(decay, (1 + n) / (10 + n)).

    Early averages forget the random start quickly; the constant decay takes over later.

    Source: TensorFlow's ExponentialMovingAverage (``num_updates``).
    """
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """average ← d · average + (1 − d) · weights, after every optimiser step.

    Args:
        network: whose parameters and buffers are averaged; copied in float32.
        decay: d once warmed up, in [0, 1].
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = dict(network.state_dict(keep_vars=True))
        self.weights = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the network's present weights; ``number`` counts updates from 0."""
        share = 1.0 - warmed_up_decay(self.decay, number)
        average = list(self.weights.values())
        torch._foreach_lerp_(average, [value.detach() for value in self._live.values()], share)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved averages.

        Raises:
            CheckpointError: the names are not this network's.
        """
        if weights.keys() != self.weights.keys():
            odd = sorted(weights.keys() ^ self.weights.keys())[0]
            raise CheckpointError(
                f"the saved average does not match the network, first at {odd!r}."
            )
        for name, value in weights.items():
            self.weights[name].copy_(value)
