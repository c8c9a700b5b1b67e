"""A data set: every image decoded, one uint8 array in memory.

    folder of images  ─┐
    .npz / .npy        ├─▶ open_dataset ─▶ ImageDataset(images (N, C, H, W) uint8, labels, names)
    IDX files (MNIST)  ─┘

Decoding once and keeping the pixels (28×28 grey: 784 bytes an image; 64×64 colour: 12 kB) means
training needs no worker processes and no loader state: a batch is an index into an array.
``max_memory_gib`` bounds it.
"""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import DataError

from .config import DataConfig

__all__ = ["ImageDataset", "check_memory", "open_dataset"]

ARRAY_SUFFIXES = (".npz", ".npy")


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageDataset:
    """Decoded images.

    Args:
        images: (N, C, H, W) uint8, H = W, C 1 or 3.
        labels: (N,) int64 in [0, num_classes), or None for an unconditional data set.
        class_names: a name for every label; empty when ``labels`` is None.
        skipped: (file, why) of every image file that could not be used.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """How many classes; 0 for an unconditional data set."""
        return len(self.class_names)

    def fingerprint(self) -> str:
        """SHA-256 of the shape, pixels and labels: resuming on other data is refused by it."""
        digest = hashlib.sha256(str(self.images.shape).encode())
        digest.update(np.ascontiguousarray(self.images).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()


def open_dataset(path: str | Path, config: DataConfig) -> ImageDataset:
    """Read the images at ``path``, whatever they are kept in.

    Args:
        path: a folder of images (sub-folders are classes), a folder with IDX files, an IDX images
            file, or a ``.npz``/``.npy`` file.
        config: how to read them.

    Raises:
        DataError: nothing there, not a known kind, empty, malformed, or too large for memory.
    """
    from . import arrays, idx, image_folder

    source = Path(path)
    try:
        mode = source.stat().st_mode
    except OSError as error:
        raise DataError(
            f"no data at {str(source)!r}: {error.strerror}. Give --data a folder of images, a .npz "
            "or .npy file, or a folder with IDX files."
        ) from error
    if stat.S_ISDIR(mode):
        if idx.looks_like_idx_folder(source):
            return _checked(idx.read_idx_folder(source, config), source)
        return _checked(image_folder.read_image_folder(source, config), source)
    if not stat.S_ISREG(mode):
        raise DataError(f"{str(source)!r} is neither a file nor a folder (a pipe or a device?).")
    if source.suffix.lower() in ARRAY_SUFFIXES:
        return _checked(arrays.read_array_file(source, config), source)
    if idx.looks_like_idx(source):
        return _checked(idx.read_idx_images(source, config), source)
    raise DataError(
        f"{str(source)!r} is not a data set this project reads: expected a folder, "
        f"{' or '.join(ARRAY_SUFFIXES)}, or an IDX file (…-images-idx3-ubyte, .gz too)."
    )


def _checked(dataset: ImageDataset, source: Path) -> ImageDataset:
    if len(dataset) == 0:
        raise DataError(f"{str(source)!r} holds no images.")
    return dataset


def check_memory(count: int, config: DataConfig, channels: int) -> None:
    """Refuse a data set that would not fit before decoding it.

    Args:
        count: how many images there are.
        config: has the image size and the bound.
        channels: channels of a decoded image.

    Raises:
        DataError: count · channels · image_size² bytes exceed ``max_memory_gib``.
    """
    needed_gib = count * channels * config.image_size**2 / 2**30
    if needed_gib > config.max_memory_gib:
        raise DataError(
            f"{count} images of {config.image_size}×{config.image_size}×{channels} need "
            f"{needed_gib:.3g} GiB of memory, over the bound of {config.max_memory_gib:g} GiB. "
            "Raise --max-memory-gib, lower --image-size, or give fewer images."
        )
