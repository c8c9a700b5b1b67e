"""The only seam to an inference library: tensors and timesteps in, predictions out.

    backend = open(...)                     the network is loaded
    binding = backend.allocate(capacity)    fixed buffers, bound once
    binding.sample[:n] = …; binding.run(n)  → binding.prediction[:n]
    backend.close()

A backend knows nothing of schedules, samplers or seeds. ``allocate`` may be called several times:
each binding has its own buffers, and bindings may run from different threads at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import ConfigurationError

__all__ = ["Backend", "CachedBinding", "NetworkBinding", "NetworkShape"]


@dataclass(frozen=True, kw_only=True)
class NetworkShape:
    """What a backend must know of a network's tensors.

    Args:
        image: (channels, height, width) of a sample.
        prediction_channels: channels of the prediction.
        num_classes: 0 when there is no label input.
    """

    image: tuple[int, int, int]
    prediction_channels: int
    num_classes: int

    def rows_for(self, lanes: int) -> int:
        """Network rows that lanes take at most: guidance asks a second one of each."""
        return lanes * (2 if self.num_classes else 1)

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> NetworkShape:
        """The shape a manifest describes."""
        image = bundle.manifest.image
        return cls(
            image=(image.channels, image.height, image.width),
            prediction_channels=bundle.prediction_channels,
            num_classes=bundle.manifest.network.num_classes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkBinding:
    """Buffers of ``capacity`` network rows, and the call that evaluates the first n of them.

    Args:
        sample: (capacity, C, H, W) float32, written by the caller.
        timestep: (capacity,) float32, written by the caller.
        label: (capacity,) int64, written by the caller; ignored by unconditional networks.
        prediction: (capacity, prediction_channels, H, W) float32, written by ``run``.
        run: evaluates rows [0, n) for 1 ≤ n ≤ capacity.
    """

    sample: NDArray[np.float32]
    timestep: NDArray[np.float32]
    label: NDArray[np.int64]
    prediction: NDArray[np.float32]
    run: Callable[[int], None]

    @property
    def capacity(self) -> int:
        """Network rows the buffers hold."""
        return len(self.sample)


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedBinding:
    """Buffers for step caching: the network in two parts; see ``evaluation.py``.

    Args:
        sample, timestep, label, prediction: as in :class:`NetworkBinding`.
        deep: (capacity, channels, height, width) float32, deep features: written by ``run_whole``,
            read by ``run_shallow``.
        run_whole: evaluates rows [0, n) wholly.
        run_shallow: evaluates the outer layers of rows [0, n), on ``deep``.
    """

    sample: NDArray[np.float32]
    timestep: NDArray[np.float32]
    label: NDArray[np.int64]
    prediction: NDArray[np.float32]
    deep: NDArray[np.float32]
    run_whole: Callable[[int], None]
    run_shallow: Callable[[int], None]


class Backend(Protocol):
    """A loaded network."""

    @property
    def name(self) -> str:
        """Short name, as ``--backend`` takes it."""

    @property
    def description(self) -> str:
        """What runs and on what, for people: library, version, device, threads."""

    @property
    def shape(self) -> NetworkShape:
        """The network's tensors."""

    def allocate(self, capacity: int) -> NetworkBinding:
        """Make buffers for up to ``capacity`` network rows.

        Raises:
            LifecycleError: the backend is closed.
        """

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Make buffers for up to ``capacity`` network rows with step caching.

        Raises:
            ConfigurationError: the bundle, or this backend, has no step caching.
            LifecycleError: the backend is closed.
        """

    def close(self) -> None:
        """Release the network. Idempotent."""


def allocate_buffers(
    shape: NetworkShape, capacity: int, run: Callable[[NetworkBinding, int], None]
) -> NetworkBinding:
    """A binding over zeroed NumPy buffers.

    Args:
        shape: the network's tensors.
        capacity: network rows, ≥ 1.
        run: evaluates the first n rows of the binding it is given.
    """
    channels, height, width = shape.image

    def run_rows(rows: int) -> None:
        run(binding, rows)

    binding = NetworkBinding(
        sample=np.zeros((capacity, channels, height, width), np.float32),
        timestep=np.zeros(capacity, np.float32),
        label=np.zeros(capacity, np.int64),
        prediction=np.zeros((capacity, shape.prediction_channels, height, width), np.float32),
        run=run_rows,
    )
    return binding


def allocate_cached_buffers(
    shape: NetworkShape,
    deep_shape: tuple[int, int, int],
    capacity: int,
    run_whole: Callable[[CachedBinding, int], None],
    run_shallow: Callable[[CachedBinding, int], None],
) -> CachedBinding:
    """A binding for step caching over zeroed NumPy buffers; see :func:`allocate_buffers`."""
    channels, height, width = shape.image
    binding = CachedBinding(
        sample=np.zeros((capacity, channels, height, width), np.float32),
        timestep=np.zeros(capacity, np.float32),
        label=np.zeros(capacity, np.int64),
        prediction=np.zeros((capacity, shape.prediction_channels, height, width), np.float32),
        deep=np.zeros((capacity, *deep_shape), np.float32),
        run_whole=lambda rows: run_whole(binding, rows),
        run_shallow=lambda rows: run_shallow(binding, rows),
    )
    return binding


def no_step_cache(what: str) -> ConfigurationError:
    """The error for step caching where there is none."""
    return ConfigurationError(
        f"a cache interval was asked of {what}, which has no step caching. Leave it out, or export "
        "the checkpoint with ddpm-export --step-cache and run it with backend='onnxruntime' on the "
        "processor."
    )
