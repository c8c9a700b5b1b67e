"""A judge that needs no network."""

from __future__ import annotations

import numpy as np


class PixelJudge:
    """Features are means over 4×4 patches of 7×7 pixels; the class is always 0."""

    classes = tuple("abcdefghij")

    def features(self, images, *, on_progress=None):
        patches = images.reshape(-1, 4, 7, 4, 7).mean(axis=(2, 4), dtype=np.float32)
        logits = np.zeros((len(images), 10), np.float32)
        logits[:, 0] = 1
        return patches.reshape(len(images), 16) / 25.0, logits
