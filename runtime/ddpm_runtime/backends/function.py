"""Any Python callable as a network: the public test double, and the way to bring your own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .base import NetworkBinding, NetworkShape, allocate_buffers

__all__ = ["FunctionBackend"]

Network = Callable[
    [NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]
]


class FunctionBackend:
    """A backend around ``function(sample, timestep, label) -> prediction``.

    Args:
        function: sample (N, C, H, W) float32, timestep (N,) float32, label (N,) int64 →
            (N, prediction channels, H, W); called with the first N rows of the buffers, which it
            must not keep.
        image: (C, H, W) of a sample.
        num_classes: 0 for an unconditional network.
        prediction_channels: None means C.
    """

    name = "function"

    def __init__(
        self,
        function: Network,
        image: tuple[int, int, int],
        *,
        num_classes: int = 0,
        prediction_channels: int | None = None,
    ) -> None:
        self._function = function
        self.shape = NetworkShape(
            image=image,
            prediction_channels=prediction_channels or image[0],
            num_classes=num_classes,
        )
        self.description = (
            f"Python function {getattr(function, '__name__', type(function).__name__)}"
        )

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows."""
        return allocate_buffers(self.shape, capacity, self._run)

    def close(self) -> None:
        """Nothing to release."""

    def _run(self, binding: NetworkBinding, rows: int) -> None:
        binding.prediction[:rows] = self._function(
            binding.sample[:rows], binding.timestep[:rows], binding.label[:rows]
        )
