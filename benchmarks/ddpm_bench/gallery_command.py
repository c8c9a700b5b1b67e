"""``ddpm-bench gallery``: what an engine can do besides drawing, as one picture.

start from a picture   an image, then from more and more of its noise, as another class
keep part of one       an image, the part that is kept, six ways to paint the rest
morph                  from one image to another along the great circle between their noises
encode                 an image, drawn again from its own x_T, then as other classes
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from ddpm_runtime import Engine
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.images import check_destination, grid, save_png
from ddpm_runtime.interpolation import slerp
from ddpm_runtime.noise import noise

__all__ = ["gallery_command"]

COLUMNS = 9
Pixels = NDArray[np.uint8]


@click.command("gallery")
@click.option("--engine", "engine_path", required=True, help="A class-conditional engine.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("gallery.png"))
@click.option("--seed", default=1)
@click.option("--steps", default=50, help="Of every chain; RePaint takes about ten times as long.")
@click.option("--enlarge", default=2, help="Pixels a pixel.")
def gallery_command(engine_path: str, out: Path, seed: int, steps: int, enlarge: int) -> None:
    """Start from pictures, keep parts of them, morph them, encode them: one row each."""
    check_destination(out)
    with Engine.load(engine_path) as engine:
        classes = engine.manifest.network.num_classes
        if not classes:
            raise ConfigurationError("a gallery needs an engine with classes.")
        rows = []
        for row in ROWS:
            click.echo(row.__name__.replace("_", " "), err=True)
            rows.append(row(engine, seed, steps))
    sheet = grid(np.concatenate(rows), columns=COLUMNS)
    save_png(out, sheet.repeat(enlarge, axis=0).repeat(enlarge, axis=1))
    click.echo(str(out))


def started_from_a_picture(engine: Engine, seed: int, steps: int) -> Pixels:
    """A sneaker, then boots that begin from more and more of its noise."""
    source = engine.sample(1, seed=seed, label=_class(engine, 7), steps=steps)
    strengths = np.linspace(0.3, 1.0, COLUMNS - 1)
    target = _class(engine, 9)
    images = [
        engine.sample(1, seed=seed, image=source, strength=float(s), label=target, steps=steps)
        for s in strengths
    ]
    return np.concatenate([source, *images])


def kept_in_part(engine: Engine, seed: int, steps: int) -> Pixels:
    """A dress, its upper half, and that half painted on seven times."""
    source = engine.sample(1, seed=seed, label=_class(engine, 3), steps=steps)
    height, width, _ = engine.image_shape
    mask = np.zeros((height, width), np.float32)
    mask[: height // 2] = 1.0
    painted = engine.sample(
        COLUMNS - 2, seed=seed, first_index=100, image=source, mask=mask, sampler="repaint",
        label=_class(engine, 3), steps=steps,
    )  # fmt: skip
    kept = np.where(mask[None, ..., None] > 0, source, np.uint8(128)).astype(np.uint8)
    return np.concatenate([source, kept, painted])


def morphed(engine: Engine, seed: int, steps: int) -> Pixels:
    """From one bag to another."""
    height, width, channels = engine.image_shape
    first, last = (
        noise(seed, index, 0, height * width * channels).reshape(channels, height, width)
        for index in (0, 1)
    )
    x_T = slerp(first, last, COLUMNS)
    return engine.sample(COLUMNS, x_T=x_T, label=_class(engine, 8), steps=steps)


def encoded(engine: Engine, seed: int, steps: int) -> Pixels:
    """A shirt, drawn again from its x_T, then as other classes from the same x_T."""
    label = _class(engine, 6)
    source = engine.sample(1, seed=seed, label=label, steps=steps)
    x_T = engine.encode(source, steps=2 * steps, label=label)
    others = [label, *(_class(engine, k) for k in (0, 2, 3, 4, 1, 8, 9))][: COLUMNS - 1]
    images = [
        engine.sample(1, x_T=x_T, label=other, steps=2 * steps, guidance_scale=1.0)
        for other in others
    ]
    return np.concatenate([source, *images])


ROWS: tuple[Callable[[Engine, int, int], Pixels], ...] = (
    started_from_a_picture,
    kept_in_part,
    morphed,
    encoded,
)


def _class(engine: Engine, wanted: int) -> int:
    """A class number that this engine has."""
    return wanted % engine.manifest.network.num_classes
