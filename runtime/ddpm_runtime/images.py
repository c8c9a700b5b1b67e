"""From the network's numbers to pictures people look at.

float [−1, 1] (C, H, W) → uint8 (H, W, C) → a grid, a folder of PNGs, an .npz, or a GIF. Pillow is
imported only when a picture is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_file
from .errors import ConfigurationError

__all__ = [
    "check_destination",
    "from_uint8",
    "grid",
    "read_picture",
    "save_gif",
    "save_images",
    "save_png",
    "to_uint8",
]

Pixels = NDArray[np.uint8]


def to_uint8(images: NDArray[np.float32]) -> Pixels:
    """Round [−1, 1] to 0 … 255; values outside are clipped.

    Args:
        images: (..., C, H, W) float32.

    Returns:
        (..., H, W, C) uint8.
    """
    scaled = np.rint((np.clip(images, -1.0, 1.0) + np.float32(1)) * np.float32(127.5))
    return np.ascontiguousarray(np.moveaxis(scaled, -3, -1).astype(np.uint8))


def from_uint8(pixels: Pixels) -> NDArray[np.float32]:
    """The inverse of :func:`to_uint8`: 0 … 255 to [−1, 1].

    Args:
        pixels: (..., H, W, C) uint8.

    Returns:
        (..., C, H, W) float32.
    """
    scaled = pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return np.ascontiguousarray(np.moveaxis(scaled, -1, -3))


def grid(images: Pixels, *, columns: int | None = None, padding: int = 2) -> Pixels:
    """Lay images out in rows, as near to a square as they go.

    Args:
        images: (N, H, W, C) uint8, N ≥ 1.
        columns: images a row; None means ⌈√N⌉.
        padding: pixels between images.

    Returns:
        (rows·(H + padding) + padding, …, C) uint8 on white.
    """
    count, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    sheet = np.full(
        (
            rows * (height + padding) + padding,
            columns * (width + padding) + padding,
            channels,
        ),
        255,
        np.uint8,
    )
    for i, image in enumerate(images):
        top = padding + (i // columns) * (height + padding)
        left = padding + (i % columns) * (width + padding)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_png(path: str | os.PathLike[str], image: Pixels) -> None:
    """Write one (H, W, 1 or 3) uint8 image, atomically.

    Raises:
        OSError: the destination cannot be written.
    """
    with atomic_file(path) as file:
        _pillow(image).save(file, format="PNG")


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[Pixels],
    *,
    frame_ms: int = 60,
    hold_ms: int = 1500,
) -> None:
    """Write an endless GIF, atomically.

    Args:
        path: destination.
        frames: (H, W, 1 or 3) uint8 each, at least one.
        frame_ms: how long each frame shows, in milliseconds.
        hold_ms: how long the last one does.
    """
    pictures = [_pillow(frame) for frame in frames]
    durations = [frame_ms] * (len(frames) - 1) + [hold_ms]
    with atomic_file(path) as file:
        pictures[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=durations,
            loop=0,
        )


def read_picture(path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Pixels:
    """Read a PNG, JPEG, WEBP or BMP; crop it to the shape's proportions from the middle; resize.

    Args:
        path: the file.
        shape: (H, W, 1 or 3).

    Returns:
        (H, W, 1 or 3) uint8.

    Raises:
        ConfigurationError: not such a picture, or one of more than 89 million pixels.
        OSError: the file cannot be read.
    """
    import warnings

    from PIL import Image, ImageOps, UnidentifiedImageError

    height, width, channels = shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=("PNG", "JPEG", "WEBP", "BMP")) as picture:
                plain = picture.convert("L" if channels == 1 else "RGB")
                fitted = ImageOps.fit(plain, (width, height), Image.Resampling.LANCZOS)
    except (UnidentifiedImageError, Image.DecompressionBombWarning, SyntaxError) as error:
        raise ConfigurationError(f"{path} is not a picture this can read: {error}") from error
    return np.asarray(fitted, dtype=np.uint8).reshape(shape)


def check_destination(path: str | os.PathLike[str]) -> None:
    """Refuse a destination that could not be written, before any work is done.

    Raises:
        ConfigurationError: a suffix other than .png, .gif, .npz or none.
        OSError: the folder it lies in is missing, or may not be written to.
    """
    destination = Path(path)
    if destination.suffix not in (".png", ".gif", ".npz", ""):
        raise ConfigurationError(
            f"cannot write images as {destination.suffix!r}; use a name that ends in .png (a grid) "
            "or .npz (an array), or a folder."
        )
    parent = destination.parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{destination} cannot be written: no folder {parent}; make it first."
        )
    if not os.access(parent, os.W_OK) or (not destination.suffix and destination.is_file()):
        raise PermissionError(f"{destination} cannot be written; choose another --out.")


def save_images(
    path: str | os.PathLike[str], images: Pixels, *, indices: Sequence[int] | None = None
) -> list[Path]:
    """Write images the way the path asks: ``.png`` a grid, ``.npz`` an array, else a folder.

    Args:
        path: destination; a folder gets one ``000042.png`` an image, named by its index.
        images: (N, H, W, C) uint8.
        indices: number of each image; None counts from 0.

    Returns:
        The files written.

    Raises:
        ConfigurationError: another suffix; see :func:`check_destination`.
        OSError: the destination cannot be written.
    """
    destination = Path(path)
    indices = range(len(images)) if indices is None else indices
    if destination.suffix == ".png":
        save_png(destination, grid(images))
        return [destination]
    if destination.suffix == ".npz":
        with atomic_file(destination) as file:
            np.savez_compressed(file, images=images, indices=np.array(indices, np.uint64))
        return [destination]
    check_destination(destination)
    destination.mkdir(exist_ok=True)
    files = [destination / f"{index:06d}.png" for index in indices]
    for name, image in zip(files, images, strict=True):
        save_png(name, image)
    return files


def _pillow(image: Pixels) -> Any:
    from PIL import Image

    if image.shape[-1] not in (1, 3):
        raise ConfigurationError(
            f"pictures need 1 or 3 channels; these images have {image.shape[-1]}. "
            "Write them to an .npz instead."
        )
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
