"""Images from arrays: ``.npy`` (images alone) and ``.npz`` (images, and labels beside them).

A ``.npz`` keeps its images under "images" (or has one array only) and its labels, if any, under
"labels". Nothing is ever unpickled.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import DataError

from .config import DataConfig
from .data import ImageDataset, check_memory
from .resize import fit_array

__all__ = ["dataset_from_arrays", "read_array_file"]

IMAGES_KEY, LABELS_KEY = "images", "labels"


def read_array_file(path: Path, config: DataConfig) -> ImageDataset:
    """Read a ``.npy`` or ``.npz`` file of uint8 images.

    Raises:
        DataError: not such a file, holds Python objects, too large for memory, or the arrays have
            a wrong shape or dtype.
    """
    labels = None
    try:
        _refuse_huge(path, config)
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                images = loaded
            else:
                images, labels = _members(path, loaded)
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"cannot read {str(path)!r}: {error}. Write it with numpy.save or numpy.savez, arrays "
            "of numbers only (Python objects are refused: they can run code)."
        ) from error
    return dataset_from_arrays(images, labels, config, str(path))


def dataset_from_arrays(
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    config: DataConfig,
    origin: str,
) -> ImageDataset:
    """Check arrays, bring them to the training size and channels, and make a data set.

    Args:
        images: (N, H, W) or (N, H, W, C) uint8, C 1 or 3.
        labels: (N,) whole numbers ≥ 0, or None.
        config: how to read them.
        origin: where they came from, for messages.

    Raises:
        DataError: a wrong shape, dtype or label.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"{origin}: images must be uint8 of shape (N, H, W) or (N, H, W, C); "
            f"got {images.dtype} of shape {images.shape}."
        )
    if images.ndim == 3:
        images = images[:, :, :, None]
    if images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"{origin}: images must have 1 or 3 channels, last, and none of their sizes may be 0; "
            f"got shape {images.shape}."
        )
    channels = config.image_channels or images.shape[3]
    check_memory(len(images), config, channels)
    fitted = np.empty((len(images), channels, config.image_size, config.image_size), np.uint8)
    for index, image in enumerate(images):
        fitted[index] = _with_channels(fit_array(image, config.image_size), channels)
    if labels is None or not config.labels:
        return ImageDataset(images=fitted)
    checked = _checked_labels(labels, len(images), origin)
    names = _class_names(int(checked.max()) + 1, config, origin)
    return ImageDataset(images=fitted, labels=checked, class_names=names)


def _refuse_huge(path: Path, config: DataConfig) -> None:
    """Refuse a file whose largest array, decompressed, is over the bound on memory."""
    size_bytes = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size_bytes = max((member.file_size for member in archive.infolist()), default=0)
    if size_bytes > config.max_memory_gib * 2**30:
        raise DataError(
            f"{str(path)!r} holds {size_bytes / 2**30:.3g} GiB, over the bound of "
            f"{config.max_memory_gib:g} GiB. Raise --max-memory-gib, or give fewer images."
        )


def _members(path: Path, archive: Any) -> tuple[NDArray[Any], NDArray[Any] | None]:
    names = list(archive.files)
    key = IMAGES_KEY if IMAGES_KEY in names else None
    if key is None and len(names) == 1:
        key = names[0]
    if key is None:
        raise DataError(
            f"{str(path)!r} has no array named {IMAGES_KEY!r}; it has {', '.join(names) or 'none'}."
            f" Save it with numpy.savez(file, {IMAGES_KEY}=..., {LABELS_KEY}=...)."
        )
    return archive[key], archive[LABELS_KEY] if LABELS_KEY in names else None


def _with_channels(image: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    """(H, W, C) to (channels, H, W): grey is repeated, colour becomes luma (ITU-R 601)."""
    if image.shape[2] == 3 and channels == 1:
        luma = image @ np.array([0.299, 0.587, 0.114])
        image = np.rint(luma).astype(np.uint8)[:, :, None]
    full: NDArray[np.uint8] = np.broadcast_to(
        image.transpose(2, 0, 1), (channels, *image.shape[:2])
    )
    return full


def _checked_labels(labels: NDArray[Any], count: int, origin: str) -> NDArray[np.int64]:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{origin}: labels must be whole numbers of shape ({count},), one an image; "
            f"got {labels.dtype} of shape {labels.shape}."
        )
    if int(labels.min()) < 0 or int(labels.max()) > 1_000_000:
        raise DataError(
            f"{origin}: labels must run from 0 to the number of classes less one; "
            f"got {int(labels.min())} to {int(labels.max())}."
        )
    return labels.astype(np.int64)


def _class_names(count: int, config: DataConfig, origin: str) -> tuple[str, ...]:
    names = config.class_names or tuple(str(label) for label in range(count))
    if len(names) < count:
        raise DataError(
            f"{origin} has labels up to {count - 1}, and class_names gives {len(names)} names; "
            f"give at least {count}."
        )
    return names
