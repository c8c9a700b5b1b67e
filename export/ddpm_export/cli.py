"""ddpm-export: thin over ``bundle_from_checkpoint``. The table to stdout, progress to stderr.

Exit codes: 0 done; 1 the work failed (a bad checkpoint, a network that does not agree with its
source) and nothing was written; 2 the command was wrong; 130 interrupted.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from ddpm_runtime._version import __version__
from ddpm_runtime.samplers import SAMPLERS
from ddpm_runtime.schedule import SPACINGS

__all__ = ["export_command"]


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None,
    help="Engine bundle to write.  [default: the checkpoint's name with .engine]",
)  # fmt: skip
@click.option("--name", default=None, help="Name of the engine.  [default: the output's]")
@click.option("--force", is_flag=True, help="Replace an engine that is there.")
@click.option("--sampler", type=click.Choice(sorted(SAMPLERS)), default="ddim",
              help="What the engine samples with when it is not told.")  # fmt: skip
@click.option("--steps", type=int, default=None, help="Likewise.  [default: the sampler's]")
@click.option("--spacing", type=click.Choice(sorted(SPACINGS)), default="leading", help="Likewise.")
@click.option(
    "--guidance-scale", default=1.0, help="Likewise, when a class is asked for; 1 is off."
)
@click.option("--tolerance", default=1e-5, help="Largest relative error of one evaluation.")
@click.option("--threads", type=click.IntRange(1), default=None, help="For the comparison.")
@click.version_option(__version__, prog_name="ddpm-export")
def export_command(
    checkpoint: Path, output: Path | None, name: str | None, force: bool, sampler: str,
    steps: int | None, spacing: str, guidance_scale: float, tolerance: float, threads: int | None,
) -> None:  # fmt: skip
    """Turn CHECKPOINT into an engine that ddpm-run samples without PyTorch.

    CHECKPOINT is a model.pt or model.safetensors written by ddpm-train, or a folder saved by
    diffusers. The exported network is compared with PyTorch over the whole noise range and along
    whole trajectories; when it does not agree, nothing is written.
    """
    from .pipeline import ExportOptions, bundle_from_checkpoint, default_output

    begun = time.perf_counter()
    destination = output or default_output(checkpoint)
    report = bundle_from_checkpoint(
        checkpoint,
        destination,
        name=name,
        force=force,
        options=ExportOptions(
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            guidance_scale=guidance_scale,
            tolerance=tolerance,
            threads=threads,
        ),
        progress=lambda message: click.echo(message, err=True),
    )
    size_bytes = sum(file.stat().st_size for file in destination.iterdir())
    click.echo(str(report))
    click.echo(f"{destination}: {size_bytes / 1e6:.1f} MB in {time.perf_counter() - begun:.1f} s")
