"""The inputs on which two networks are compared: real noisy images over the whole noise range.

    sample = input_scale · (signal · x_0 + noise · ε)

with signal and noise from the network's own training schedule, x_0 smooth random pictures, and ε
the runtime's noise, so every machine probes with the same bits. The last row of every batch is pure
noise, what sampling starts from. One timestep lies between two whole ones: some samplers ask there.
Labels go round all classes and "no class".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.bundle import Bundle
from ddpm_runtime.noise import noise
from ddpm_runtime.trajectory import discrete_trajectory

__all__ = ["Probe", "probe_labels", "probes"]

_SEED = 0x0DDB
_WHOLE_TIMESTEPS = 9
_COARSE = 4  # pixels a side of the picture that x_0 is blown up from


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """One network evaluation, ``rows`` images at one timestep.

    Args:
        timestep: may lie between two whole ones.
        sample: (rows, C, H, W) float32.
        label: (rows,) int64; zeros for unconditional networks.
    """

    timestep: float
    sample: NDArray[np.float32]
    label: NDArray[np.int64]

    @property
    def timesteps(self) -> NDArray[np.float32]:
        """(rows,) float32, the timestep of every row."""
        return np.full(len(self.sample), self.timestep, np.float32)


def probes(bundle: Bundle, rows: int) -> list[Probe]:
    """Probes from the last timestep to the first, and one between two.

    Args:
        bundle: says what images, schedule and classes the network has.
        rows: images a probe.
    """
    image = bundle.manifest.image
    last = bundle.schedule.num_train_timesteps - 1
    whole = np.unique(np.rint(np.linspace(last, 0, min(_WHOLE_TIMESTEPS, last + 1))))[::-1]
    between = whole[len(whole) // 2] + 0.5
    # levels only; "sample" is the one prediction type that every schedule allows
    levels = discrete_trajectory(bundle.schedule, "sample", whole)
    visits = [*zip(whole, levels.signal, levels.noise, levels.input_scale, strict=False)]
    visits.append((between, *visits[len(whole) // 2][1:]))
    shape = (image.channels, image.height, image.width)
    labels = _labels_in_turn(bundle.manifest.network.num_classes, rows * len(visits))
    made = []
    for k, (timestep, signal, noise_level, input_scale) in enumerate(visits):
        x_0 = np.stack([_picture(k * rows + i, shape) for i in range(rows)])
        epsilon = np.stack([_normals(k * rows + i, 0, shape) for i in range(rows)])
        x_t = signal * x_0 + noise_level * epsilon
        x_t[-1] = epsilon[-1]
        sample = (input_scale * x_t).astype(np.float32)
        label = np.array(list(islice(labels, rows)), np.int64)
        made.append(Probe(timestep=float(timestep), sample=sample, label=label))
    return made


def probe_labels(num_classes: int, count: int) -> list[int]:
    """Up to ``count`` labels: no class, and classes evenly over all there are."""
    if not num_classes:
        return [0]
    classes = np.unique(np.linspace(0, num_classes - 1, min(num_classes, count - 1)).astype(int))
    return [num_classes, *map(int, classes)]


def _labels_in_turn(num_classes: int, count: int) -> Iterator[int]:
    return cycle(probe_labels(num_classes, count))


def _picture(index: int, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """A smooth picture in [−1, 1]: coarse noise, linearly interpolated."""
    channels, height, width = shape
    coarse = _normals(index, 1, (channels, _COARSE, _COARSE))
    rows = np.linspace(0, _COARSE - 1, height)
    columns = np.linspace(0, _COARSE - 1, width)
    picture: NDArray[np.float64] = _blend(rows) @ coarse @ _blend(columns).T
    return picture.clip(-1.0, 1.0)


def _blend(positions: NDArray[np.float64]) -> NDArray[np.float64]:
    """(positions, coarse pixels) weights of linear interpolation."""
    return np.maximum(0.0, 1.0 - np.abs(positions[:, None] - np.arange(_COARSE)[None, :]))


def _normals(index: int, draw: int, shape: tuple[int, int, int]) -> NDArray[np.float64]:
    return noise(_SEED, index, draw, int(np.prod(shape))).astype(np.float64).reshape(shape)
