"""ddpm-train: a recipe, flags over it, one library call. Progress to stderr, the result to stdout.

Every field of a recipe is a flag; the flags are made from the config, so neither can lack what the
other has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ddpm_runtime import __version__

from .config import TrainConfig
from .data import ImageDataset, open_dataset
from .flags import recipe_flags, resolve_config
from .run_files import check_run_directory

__all__ = ["train_command"]

_SHOWN = 10
_HELP = """Train a diffusion network on images and write model.pt, ready for ddpm-export.

\b
ddpm-train --data photos/ --out runs/photos --image-size 64 --steps 100000
ddpm-train --data photos/ --out runs/photos --resume
torchrun --nproc-per-node 8 -m ddpm_train --data photos/ --out runs/photos
"""
_DATA_HELP = (
    "Folder of images (sub-folders are classes), .npz or .npy file, or folder with IDX files "
    "(MNIST's layout)."
)


@click.command(
    help=_HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--data", required=True, type=click.Path(), help=_DATA_HELP)
@click.option("--out", required=True, type=click.Path(), help="Run directory; made if missing.")
@click.option("--config", "recipe", type=click.Path(), help="Recipe (JSON); flags override it.")
@click.option("--resume", is_flag=True, help="Continue the run in --out.")
@recipe_flags
@click.version_option(__version__, prog_name="ddpm-train")
def train_command(data: str, out: str, recipe: str | None, resume: bool, **flags: Any) -> int:
    """Train; the exit code is 0, or 128 + the signal that stopped the run."""
    config = resolve_config(recipe, flags, Path(out) if resume else None)
    check_run_directory(Path(out), config, resume=resume)
    leads = os.environ.get("RANK", "0") == "0"
    dataset = open_dataset(data, config.data)
    from .loop import train  # imports torch

    if leads:
        _announce(config, dataset)
    with _Progress(config, shown=leads) as progress:
        result = train(config, dataset, out, resume=resume, on_step=progress.step)
    if result.stopped_by is not None:
        click.echo(f"stopped after step {result.step}; continue with --resume.", err=True)
        return 128 + result.stopped_by
    if leads:
        click.echo(f"{Path(out) / 'model.pt'}")
        click.echo(f"Next: ddpm-export {Path(out) / 'model.pt'}", err=True)
    return 0


def _announce(config: TrainConfig, dataset: ImageDataset) -> None:
    count, channels, size, _ = dataset.images.shape
    kind = "grey" if channels == 1 else "colour"
    classes = f"{dataset.num_classes} classes" if dataset.num_classes else "no classes"
    click.echo(f"{count} images of {size}×{size}, {kind}, {classes}", err=True)
    if dataset.skipped:
        click.echo(f"skipped {len(dataset.skipped)} image files that cannot be used:", err=True)
        for name, reason in dataset.skipped[:_SHOWN]:
            click.echo(f"  {name!r}: {reason}", err=True)
        if len(dataset.skipped) > _SHOWN:
            click.echo("  ... all are listed in skipped.txt of the run directory", err=True)


class _Progress:
    """A bar with loss, images/s and ETA on stderr."""

    def __init__(self, config: TrainConfig, *, shown: bool) -> None:
        self._batch_size = config.optimization.batch_size
        self._steps = config.optimization.steps
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, step: int, row: Mapping[str, float] | None) -> None:
        if self._bar is None:
            self._bar = self._start(step - 1)
        self._bar.set_description(f"step {step}", refresh=False)
        if row is not None:
            self._bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        self._bar.update(self._batch_size)

    def _start(self, done: int) -> Any:
        terminal = sys.stderr.isatty()
        return tqdm(
            total=self._steps * self._batch_size,
            initial=done * self._batch_size,
            unit=" images",
            unit_scale=True,
            disable=not self._shown,
            file=sys.stderr,
            mininterval=0.5 if terminal else 30.0,
            dynamic_ncols=terminal,
        )
