"""The training curve as a picture: loss against steps, drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ddpm_runtime.images import save_png

__all__ = ["draw_curve"]

_WIDTH, _HEIGHT = 960, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 20, 40, 50
_GREY, _PALE, _LINE = (110, 110, 110), (225, 225, 225), (31, 90, 160)
_FAINT = (180, 205, 235)
_SMOOTHING = 0.02  # share of the run over which the bold line averages


def draw_curve(path: Path, steps: Sequence[float], losses: Sequence[float], title: str) -> None:
    """Write a PNG: every row faintly, a running mean boldly, the loss on a logarithmic axis.

    Args:
        path: where.
        steps: rising step numbers, at least two, or nothing is drawn.
        losses: a positive loss for every step.
        title: printed on top.
    """
    if len(steps) < 2 or min(losses) <= 0:
        return
    picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(14)
    last, low, high = max(steps), min(losses), max(losses)

    def at(step: float, loss: float) -> tuple[float, float]:
        across = step / last
        up = math.log(loss / low) / max(math.log(high / low), 1e-9)
        return (
            _LEFT + across * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    draw.text((_LEFT, 12), title, fill="black", font=font)
    draw.text((_WIDTH // 2, _HEIGHT - 22), "step", fill=_GREY, font=font)
    for loss in _loss_ticks(low, high):
        draw.line([at(0, loss), at(last, loss)], fill=_PALE)
        draw.text((8, at(0, loss)[1] - 8), f"{loss:.3g}", fill=_GREY, font=font)
    for part in range(5):
        step = last * part / 4
        x, y = at(step, low)
        draw.text((x - 20 * (part > 0), y + 6), f"{step:.0f}", fill=_GREY, font=font)
    draw.line([at(*point) for point in zip(steps, losses, strict=True)], fill=_FAINT)
    smooth = _running_mean(losses, max(1, round(_SMOOTHING * len(losses))))
    draw.line([at(*point) for point in zip(steps, smooth, strict=True)], fill=_LINE, width=2)
    save_png(path, np.asarray(picture))


def _loss_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten within [low, high], and the two ends if there are too few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) > 1 else [low, high]


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """The mean of the last ``width`` values (fewer at the start), at every place."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return [float(mean) for mean in (sums[ends] - sums[starts]) / (ends - starts)]
