"""Real images to measure against, read by the readers that training uses (no PyTorch)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import ConfigurationError, choose
from ddpm_train.config import DataConfig
from ddpm_train.data import open_dataset
from ddpm_train.idx import looks_like_idx_folder

__all__ = ["RealImages", "class_counts", "read_real_images", "splits_of"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RealImages:
    """Real images in memory.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) int64, or None when the data has none.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: NDArray[np.int64]) -> RealImages:
        """The images at ``indices (M,)``, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        return RealImages(images=self.images[indices], labels=labels)

    def disjoint_subsets(
        self, counts: Sequence[int], splits: int, rng: np.random.Generator
    ) -> list[RealImages]:
        """Up to ``splits`` random subsets that share no image.

        Args:
            counts: how many images of each class; ``[n]`` when classes do not matter.
            splits: subsets wanted; fewer come back when the data runs out.
            rng: decides which images.

        Raises:
            ConfigurationError: not even one subset can be drawn.
        """
        if len(counts) > 1 and self.labels is None:
            raise ConfigurationError("classes cannot be balanced: this data has no labels.")
        groups = [np.arange(len(self))]
        if len(counts) > 1:
            groups = [np.flatnonzero(self.labels == label) for label in range(len(counts))]
        orders = [rng.permutation(group) for group in groups]
        wanted = list(zip(orders, counts, strict=True))
        possible = min((len(order) // count for order, count in wanted if count), default=0)
        if possible < 1:
            raise ConfigurationError(
                f"a set of {sum(counts)} images with the same classes cannot be drawn from "
                f"{len(self)} real images; measure at most "
                f"{len(counts) * min(len(order) for order in orders)} images."
            )
        return [
            self.subset(
                np.concatenate([order[k * count : (k + 1) * count] for order, count in wanted])
            )
            for k in range(min(splits, possible))
        ]


def read_real_images(
    path: str | os.PathLike[str], *, split: str, size: int, channels: int
) -> RealImages:
    """Read a data set at the size an engine draws.

    Args:
        path: IDX folder, folder of images, or ``.npz``/``.npy``, as ``ddpm-train --data`` takes.
        split: one of :func:`splits_of`.
        size: height and width in pixels.
        channels: 1 or 3.

    Raises:
        DataError: nothing there, or not readable as images.
        ConfigurationError: the data has no such split.
    """
    choose("split", split, splits_of(path))
    part = "train" if split == "all" else split  # read by IDX folders only
    config = DataConfig(image_size=size, image_channels=channels, split=part)
    dataset = open_dataset(os.fspath(path), config)
    images = np.ascontiguousarray(np.moveaxis(dataset.images, 1, -1))
    return RealImages(images=images, labels=dataset.labels)


def splits_of(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Which parts the data at ``path`` is divided into, held-out first; ("all",) for one part."""
    folder = Path(path)
    if folder.is_dir() and looks_like_idx_folder(folder):
        return tuple(
            split for split in ("t10k", "train") if any(folder.glob(f"{split}-images-*ubyte*"))
        )
    return ("all",)


def class_counts(labels: NDArray[np.int64] | None, total: int, classes: int) -> list[int]:
    """How many images of each class there are; ``[total]`` without labels."""
    if labels is None:
        return [total]
    return [int(count) for count in np.bincount(labels, minlength=classes)]
