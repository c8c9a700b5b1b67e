"""What goes into every step: a pure function of (seed, step), sliced by process.

Every process draws for the whole batch and keeps its own slice, so that n processes see exactly
what one process would see.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig
from .data import ImageDataset
from .seeds import generator_for

__all__ = ["Batch", "BatchSource", "pixels_to_network"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """One process's share of one step.

    Args:
        x_0: (n, C, H, W) float32 in [−1, 1].
        epsilon: (n, C, H, W) float32, standard normal.
        timesteps: (n,) int64 in [0, T − 1].
        labels: (n,) int64 in [0, num_classes], the last meaning "no class"; None if unconditional.
    """

    x_0: Tensor
    epsilon: Tensor
    timesteps: Tensor
    labels: Tensor | None

    def split(self, parts: int) -> list[Batch]:
        """Equal consecutive parts, for gradient accumulation."""
        size = len(self.x_0) // parts
        return [self._rows(slice(start, start + size)) for start in range(0, parts * size, size)]

    def _rows(self, rows: slice) -> Batch:
        return Batch(
            x_0=self.x_0[rows],
            epsilon=self.epsilon[rows],
            timesteps=self.timesteps[rows],
            labels=None if self.labels is None else self.labels[rows],
        )


class BatchSource:
    """Draws batches from a data set.

    Args:
        dataset: the images.
        config: has seed, batch size, flip, label dropout.
        num_train_timesteps: T.
        device: where batches are wanted; noise is drawn there.
        rank: this process.
        world_size: how many processes share a batch; divides ``batch_size``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        config: TrainConfig,
        num_train_timesteps: int,
        *,
        device: torch.device,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._images = torch.from_numpy(dataset.images)
        self._labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
        self._num_classes = dataset.num_classes
        self._config, self._T, self._device = config, num_train_timesteps, device
        share = config.optimization.batch_size // world_size
        self._mine = slice(rank * share, (rank + 1) * share)
        self._order: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """This process's share of step number ``step`` (0, 1, ...)."""
        seed, size = self._config.run.seed, self._config.optimization.batch_size
        chosen = self.indices(step)[self._mine]
        pixels = self._images[chosen]
        if self._config.data.flip:
            mirrored = torch.rand(size, generator=generator_for(seed, "flip", step)) < 0.5
            where = mirrored[self._mine][:, None, None, None]
            pixels = torch.where(where, pixels.flip(-1), pixels)
        timesteps = torch.randint(
            self._T, (size,), generator=generator_for(seed, "timesteps", step)
        )[self._mine]
        noise = torch.randn(
            (size, *pixels.shape[1:]),
            generator=generator_for(seed, "noise", step, device=self._device),
            device=self._device,
        )[self._mine]
        labels = self._batch_labels(step, chosen)
        return Batch(
            x_0=pixels_to_network(pixels.to(self._device, non_blocking=True)),
            epsilon=noise,
            timesteps=timesteps.to(self._device, non_blocking=True),
            labels=None if labels is None else labels.to(self._device, non_blocking=True),
        )

    def indices(self, step: int) -> Tensor:
        """Which images step number ``step`` uses: (batch_size,) int64.

        Epoch e visits every image once, in the order drawn from (seed, e); a batch may begin in
        one epoch and end in the next.
        """
        size, count = self._config.optimization.batch_size, len(self._images)
        position, wanted, parts = step * size, size, []
        while wanted:
            epoch, start = divmod(position, count)
            part = self._epoch_order(epoch)[start : start + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return torch.cat(parts)

    def _epoch_order(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = generator_for(self._config.run.seed, "order", epoch)
            self._order = epoch, torch.randperm(len(self._images), generator=generator)
        return self._order[1]

    def _batch_labels(self, step: int, chosen: Tensor) -> Tensor | None:
        if self._labels is None:
            return None
        generator = generator_for(self._config.run.seed, "label dropout", step)
        draws = torch.rand(self._config.optimization.batch_size, generator=generator)
        hidden = draws[self._mine] < self._config.diffusion.label_dropout
        return torch.where(hidden, self._num_classes, self._labels[chosen])


def pixels_to_network(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 to float32 −1 … 1: value / 127.5 − 1."""
    return pixels.float() / 127.5 - 1.0
