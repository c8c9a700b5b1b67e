"""The steps since the last row of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpm_runtime.errors import NonFiniteError

from .distributed import Processes

__all__ = ["Window"]


class Window:
    """Losses and gradient norms of the steps since the last row, and the time they took.

    Values stay on the device until a row is made: reading one every step would stall a GPU.

    Args:
        batch_size: images a step.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Time steps from now on."""
        self._since, self._timed = time.perf_counter(), 0

    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Take in a step: its loss and the norm of its gradient, each () float32."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._timed += 1

    def row(self, step: int, processes: Processes) -> dict[str, float]:
        """The means over the window, as columns of the metrics.

        Raises:
            NonFiniteError: a loss is NaN or infinite.
        """
        loss = processes.mean(_mean(self._losses))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} within the {len(self._losses)} steps up to {step}. The "
                "last checkpoint is from before; resume it in a new run with a lower "
                "--learning-rate, a longer --warmup-steps, or --precision fp32."
            )
        seconds = max(time.perf_counter() - self._since, 1e-9)
        return {
            "step": step,
            "images": step * self._batch_size,
            "loss": loss,
            "gradient_norm": _mean(self._norms),
            "images_per_second": self._timed * self._batch_size / seconds,
        }

    def clear(self) -> None:
        """Begin the next window."""
        self._losses, self._norms = [], []
        self.start_clock()

    def state(self) -> dict[str, list[float]]:
        """What must be kept for the next row to come out the same after a resume."""
        return {"losses": _numbers(self._losses), "norms": _numbers(self._norms)}

    def load_state(self, values: Mapping[str, Sequence[float]]) -> None:
        """Continue from what :meth:`state` gave."""
        self._losses = [torch.tensor(value) for value in values["losses"]]
        self._norms = [torch.tensor(value) for value in values["norms"]]


def _numbers(values: Sequence[Tensor]) -> list[float]:
    return [float(value) for value in values]


def _mean(values: Sequence[Tensor]) -> float:
    return math.fsum(_numbers(values)) / max(len(values), 1)
