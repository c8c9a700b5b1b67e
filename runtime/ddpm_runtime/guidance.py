"""Classifier-free guidance: one formula.

    m = uncond + guidance_scale · (cond − uncond)

guidance_scale = 1 is the conditional network alone (off); 0 is the unconditional one.

Source: Ho & Salimans, arXiv 2207.12598 eq. 6, where their w is guidance_scale − 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["guide"]


def guide(
    conditional: NDArray[np.float32],
    unconditional: NDArray[np.float32],
    guidance_scale: NDArray[np.float32],
) -> None:
    """Replace the conditional predictions by the guided ones.

    Args:
        conditional: (lanes, C, H, W) float32, overwritten.
        unconditional: (lanes, C, H, W) float32.
        guidance_scale: (lanes,) float32.
    """
    conditional -= unconditional
    conditional *= guidance_scale[:, None, None, None]
    conditional += unconditional
