"""One image file to pixels, trusting nothing about the file.

Accepted: PNG, JPEG, WebP and BMP that say what they are, still, 8 bits a channel, within the pixel
bound. Refused: everything else, with a reason. A truncated file is refused, never half used.
Orientation (EXIF) is applied; transparency is composited over white; palettes, CMYK and two-level
images become RGB or grey.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from .config import DataConfig
from .resize import fit_image

__all__ = ["SUFFIXES", "UnusableImageError", "read_image"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_GREY_MODES = ("1", "L", "LA", "La")
_DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class UnusableImageError(Exception):
    """Why a file cannot be trained on."""


def read_image(path: Path, config: DataConfig) -> tuple[NDArray[np.uint8], bool]:
    """Decode one file to the training size.

    Args:
        path: the file.
        config: size, channels, bounds.

    Returns:
        (C, size, size) uint8 with C = ``image_channels``, or 3 where that is 0; and whether the
        file is in colour.

    Raises:
        UnusableImageError: the file cannot be used; the message says why.
    """
    try:
        with os.fdopen(_open_regular(path, config), "rb") as file:
            return _decode(file, config)
    except UnusableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"not a {', '.join(_FORMATS)} image") from error
    except OSError as error:
        raise UnusableImageError(error.strerror or str(error) or "unreadable") from error
    except Exception as error:  # PIL raises SyntaxError, ValueError, struct.error, ... by format
        raise UnusableImageError(f"damaged: {type(error).__name__}: {error}") from error


def _open_regular(path: Path, config: DataConfig) -> int:
    """A descriptor of a regular file; never waits on a pipe, never touches a device."""
    follow = 0 if config.follow_links else getattr(os, "O_NOFOLLOW", 0)
    if path.is_symlink() and not config.follow_links:
        raise UnusableImageError("a symbolic link (allow them with --follow-links)")
    if not stat.S_ISREG(path.stat().st_mode):
        raise UnusableImageError("not a regular file")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | follow)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it changed since
        os.close(descriptor)
        raise UnusableImageError("not a regular file")
    return descriptor


def _decode(file: object, config: DataConfig) -> tuple[NDArray[np.uint8], bool]:
    with Image.open(file, formats=_FORMATS) as image:  # type: ignore[arg-type]
        _check_header(image, config)
        colour = image.mode not in _GREY_MODES
        image.draft(None, (2 * config.image_size, 2 * config.image_size))  # JPEG: decode smaller
        upright = ImageOps.exif_transpose(image)
        fitted = fit_image(_flattened(upright, colour=colour), config.image_size)
    mode = "L" if config.image_channels == 1 else "RGB"
    pixels = np.asarray(fitted.convert(mode))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), colour


def _check_header(image: Image.Image, config: DataConfig) -> None:
    """Refuse by what the header says, before any pixel is decoded."""
    width, height = image.size
    if width * height > config.max_megapixels * 1e6:
        raise UnusableImageError(
            f"{width}×{height} pixels, over the bound of {config.max_megapixels:g} megapixels"
        )
    # A JPEG with several pictures ("MPO", as phones write them) has the photo itself first.
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise UnusableImageError("animated")
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    if image.mode in _DEEP_MODES or any(";16" in raw_mode for raw_mode in raw_modes):
        raise UnusableImageError("16 bits a channel or more")


def _flattened(image: Image.Image, *, colour: bool) -> Image.Image:
    """To "RGB" or "L", transparency composited over white."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB" if colour else "L")
