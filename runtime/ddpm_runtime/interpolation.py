"""Between two noises: along the great circle, since a straight line would leave their shell."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError

__all__ = ["slerp"]


def slerp(first: NDArray[np.float32], last: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """Spherical interpolation between two x_T, both ends included.

        x(u) = sin((1 − u)·θ)/sin θ · first + sin(u·θ)/sin θ · last,   θ the angle between them

    Args:
        first: (C, H, W) float32.
        last: the same shape.
        n: how many, ≥ 2.

    Returns:
        (n, C, H, W) float32, for ``Settings.x_T``.

    Raises:
        ConfigurationError: n < 2, unequal shapes.

    Source: Shoemake, SIGGRAPH 1985; used on x_T by Song et al., arXiv 2010.02502 eq. 67.
    """
    if n < 2 or first.shape != last.shape:
        raise ConfigurationError(
            f"slerp takes two arrays of one shape and n ≥ 2; got {first.shape}, {last.shape}, {n}."
        )
    a, b = first.astype(np.float64), last.astype(np.float64)
    cosine = float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))
    angle = np.arccos(np.clip(cosine, -1.0, 1.0))
    u = np.linspace(0.0, 1.0, n)[:, None, None, None]
    if np.sin(angle) < 1e-6:  # the same direction, or opposite ones: no circle to follow
        return ((1 - u) * a + u * b).astype(np.float32)
    blended = (np.sin((1 - u) * angle) * a + np.sin(u * angle) * b) / np.sin(angle)
    return np.asarray(blended, dtype=np.float32)
