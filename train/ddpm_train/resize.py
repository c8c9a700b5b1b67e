"""Bring one image to the training size: resize the shorter side, then crop the centre."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = ["fit_array", "fit_image"]


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side is ``size`` (Lanczos), and crop the centre square.

    An image already ``size``×``size`` is returned untouched.
    """
    width, height = image.size
    if (width, height) == (size, size):
        return image
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def fit_array(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """:func:`fit_image` for an array.

    Args:
        image: (H, W, C) uint8, C 1 or 3.
        size: height and width wanted.

    Returns:
        (size, size, C) uint8.
    """
    if image.shape[:2] == (size, size):
        return image
    grey = image.shape[2] == 1
    fitted = fit_image(Image.fromarray(image[:, :, 0] if grey else image), size)
    return np.asarray(fitted).reshape(size, size, image.shape[2])
