"""Any Python callable as a network: the public test double, and the way to bring your own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .base import (
    CachedBinding,
    NetworkBinding,
    NetworkShape,
    allocate_buffers,
    allocate_cached_buffers,
    no_step_cache,
)

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
        cached: the network in two parts, for step caching: ``whole(sample, timestep, label) ->
            (prediction, deep)`` and ``shallow(sample, timestep, label, deep) -> prediction``, with
            deep (N, *deep_shape).
        deep_shape: (channels, height, width) of the deep features.
    """

    name = "function"

    def __init__(
        self,
        function: Network,
        image: tuple[int, int, int],
        *,
        num_classes: int = 0,
        prediction_channels: int | None = None,
        cached: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
        deep_shape: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        self._function = function
        self._cached, self._deep_shape = cached, deep_shape
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

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Make buffers for up to ``capacity`` network rows with step caching.

        Raises:
            ConfigurationError: it was made without ``cached``.
        """
        if self._cached is None:
            raise no_step_cache(self.description)
        whole, shallow = self._cached

        def run_whole(binding: CachedBinding, rows: int) -> None:
            answer = whole(binding.sample[:rows], binding.timestep[:rows], binding.label[:rows])
            binding.prediction[:rows], binding.deep[:rows] = answer

        def run_shallow(binding: CachedBinding, rows: int) -> None:
            binding.prediction[:rows] = shallow(
                *(binding.sample[:rows], binding.timestep[:rows], binding.label[:rows]),
                binding.deep[:rows],
            )

        return allocate_cached_buffers(
            self.shape, self._deep_shape, capacity, run_whole, run_shallow
        )

    def close(self) -> None:
        """Nothing to release."""

    def _run(self, binding: NetworkBinding, rows: int) -> None:
        binding.prediction[:rows] = self._function(
            binding.sample[:rows], binding.timestep[:rows], binding.label[:rows]
        )
