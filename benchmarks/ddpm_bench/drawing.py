"""Images to judge: drawn from an engine, or read from a file that ddpm-run wrote."""

from __future__ import annotations

import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from ddpm_runtime import Engine, StepEvent
from ddpm_runtime.errors import DataError

__all__ = ["Drawing", "draw", "read_images"]

# np.load and its archives raise all of these for files that hold something else
_NOT_AN_ARCHIVE = (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawing:
    """A set of images and where they come from.

    Args:
        images: (n, H, W, C) uint8.
        labels: (n,) int64, the class asked for, or None.
        source: plain JSON values that tell how to make them again.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    source: dict[str, Any] = field(default_factory=dict)


def draw(
    engine: Engine,
    n: int,
    *,
    sampler: str | None,
    steps: int | None,
    spacing: str | None,
    guidance_scale: float | None,
    seed: int,
    cache_interval: int | None = None,
    batch_size: int | None = None,
) -> Drawing:
    """Draw images 0 … n − 1 of a seed, classes dealt out in turn, progress on stderr.

    Args:
        engine: what to draw from.
        n: how many, ≥ 1.
        sampler: None means the engine's default.
        steps: None means the default of the sampler.
        spacing: which timesteps to visit; None means the default of the sampler.
        guidance_scale: None means the engine's default; 1 is off.
        seed: of every image.
        cache_interval: of step caching; 1 or None is off.
        batch_size: images in flight; changes speed only.

    Raises:
        ConfigurationError: a bad value or an impossible combination.
    """
    classes = engine.manifest.network.num_classes
    labels = np.arange(n) % classes if classes else None
    program = engine.program(sampler=sampler, steps=steps, spacing=spacing)
    started = time.perf_counter()
    layout = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}]"
    name = f"{program.sampler} {len(program)}"
    with tqdm(total=n, unit=" images", desc=name, bar_format=layout, file=sys.stderr) as bar:

        def on_step(event: StepEvent) -> None:
            bar.update(n * event.rows_done / event.rows_total - bar.n)

        images = engine.sample(
            n,
            seed=seed,
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            label=None if labels is None else [int(label) for label in labels],
            guidance_scale=guidance_scale,
            cache_interval=cache_interval,
            batch_size=batch_size,
            on_step=on_step,
        )
    seconds = time.perf_counter() - started
    defaults = engine.manifest.defaults
    if guidance_scale is None:
        guidance_scale = defaults.guidance_scale if classes else 1.0
    source = {
        "sampler": program.sampler,
        "steps": len(program) if steps is None else steps,
        "evaluations": program.evaluations,
        "spacing": spacing or engine.defaults_for(sampler or defaults.sampler)[1],
        "guidance_scale": guidance_scale,
        "cache_interval": cache_interval or 1,
        "seed": seed,
        "seconds": round(seconds, 2),
    }
    return Drawing(images=images, labels=labels, source=_engine_source(engine) | source)


def _engine_source(engine: Engine) -> dict[str, Any]:
    manifest = engine.manifest
    return {
        "engine": manifest.name,
        "network_sha256": manifest.files["network.onnx"].sha256,
        "exported_precision": manifest.network.precision,
        "backend": engine.description,
        "classes": "in turn" if manifest.network.num_classes else "none",
    }


def read_images(path: Path, *, classes_in_turn: int = 0) -> Drawing:
    """Read images from an ``.npz``: "images", and "labels" or (from ddpm-run) "indices".

    Args:
        path: the file.
        classes_in_turn: number of classes, when image ``index`` was asked to be class
            ``index`` modulo that (``ddpm-run --class all``); 0 when labels are in the file or
            there are none.

    Raises:
        DataError: not such a file.
    """
    try:
        # opened here: np.load leaves the file open when it is no archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["images"]
            labels = arrays.get("labels")
            indices = arrays.get("indices", np.arange(len(images)))
    except _NOT_AN_ARCHIVE as error:
        raise DataError(
            f"no images in {path.name}: {error}. Write them with ddpm-run --out {path.stem}.npz, "
            "or with numpy.savez(file, images=..., labels=...)."
        ) from error
    if classes_in_turn:
        labels = np.asarray(indices, np.uint64) % np.uint64(classes_in_turn)
    if images.ndim == 3:
        images = images[..., None]
    return Drawing(
        images=images,
        labels=None if labels is None else np.asarray(labels).astype(np.int64),
        source={"images": path.name},
    )
