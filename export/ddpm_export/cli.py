"""ddpm-export: thin over the pipeline. Tables and files to stdout, progress to stderr.

Exit codes: 0 done; 1 the work failed (a bad checkpoint, a network that does not agree with its
source) and nothing was written, or the engine was, as printed, and only its plan failed; 2 the
command was wrong; 130 interrupted. Must not import torch or onnx before it knows the source.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ddpm_runtime._version import __version__
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.plans import LIBRARIES
from ddpm_runtime.samplers import SAMPLERS
from ddpm_runtime.schedule import SPACINGS

from .destination import PRECISIONS, default_output, looks_like_engine
from .plan import CAPACITY, PreparedPlan, check_plan_path, default_plan_path, prepare_plan

if TYPE_CHECKING:
    from .pipeline import ExportOptions

__all__ = ["export_command"]

_OF_A_CHECKPOINT = ("sampler", "steps", "spacing", "guidance_scale", "tolerance")
_OF_WRITING = ("output", "name", "threads")
_OF_A_PLAN = ("sms", "capacity", "library")


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None,
    help="Engine bundle to write.  [default: the checkpoint's name with .engine, .fp16.engine, …]",
)  # fmt: skip
@click.option(
    "--name", default=None, help="Name of the engine.  [default: the output's; an engine's own]"
)
@click.option("--force", is_flag=True, help="Replace an engine, or a plan, that is there.")
@click.option("--precision", type=click.Choice(PRECISIONS), default=None,
              help="What the network is written in.  [default: fp32]")  # fmt: skip
@click.option("--step-cache", type=click.IntRange(1), default=None,
              help="Also write the network in two parts, to keep deep features between steps; so "
              "many skip connections are outside of them. 1 is fastest.")  # fmt: skip
@click.option("--sampler", type=click.Choice(sorted(SAMPLERS)), default="ddim",
              help="What the engine samples with when it is not told.")  # fmt: skip
@click.option("--steps", type=int, default=None, help="Likewise.  [default: the sampler's]")
@click.option("--spacing", type=click.Choice(sorted(SPACINGS)), default=None,
              help="Likewise.  [default: the sampler's]")  # fmt: skip
@click.option(
    "--guidance-scale", default=1.0, help="Likewise, when a class is asked for; 1 is off."
)
@click.option("--tolerance", default=1e-5, help="Largest relative error in float32.")
@click.option("--threads", type=click.IntRange(1), default=None, help="For the comparison.")
@click.option("--tensorrt", is_flag=True, help="Write a TensorRT plan beside the engine, too.")
@click.option("--sm", "sms", type=int, multiple=True,
              help="Compute capability times ten (89) to build the plan for, by TensorRT-RTX and "
              "without a GPU; may be repeated.  [default: the GPU here]")  # fmt: skip
@click.option("--capacity", type=click.IntRange(1), default=CAPACITY,
              help="Most rows the plan takes at once; guidance doubles a batch's.")  # fmt: skip
@click.option("--library", type=click.Choice(tuple(LIBRARIES)), default=None,
              help="What builds the plan.  [default: tensorrt; tensorrt_rtx with --sm]",
              )  # fmt: skip
@click.version_option(__version__, prog_name="ddpm-export")
@click.pass_context
def export_command(
    context: click.Context, checkpoint: Path, output: Path | None, name: str | None, force: bool,
    precision: str | None, step_cache: int | None, sampler: str, steps: int | None,
    spacing: str | None, guidance_scale: float, tolerance: float, threads: int | None,
    tensorrt: bool, sms: tuple[int, ...], capacity: int, library: str | None,
) -> None:  # fmt: skip
    """Turn CHECKPOINT into an engine that ddpm-run samples without PyTorch.

    CHECKPOINT is a model.pt or model.safetensors written by ddpm-train, or a folder saved by
    diffusers. The exported network is compared with PyTorch over the whole noise range and along
    whole trajectories; when it does not agree, nothing is written. In fp16 and bf16 it is then
    compared with the float32 network, likewise.

    CHECKPOINT may also be an engine: a float32 one for --precision or --step-cache, any for
    --tensorrt. That needs no PyTorch.
    """
    from_engine = looks_like_engine(checkpoint)
    _refuse_strays(context, from_engine=from_engine)
    writes_engine = not from_engine or precision is not None or step_cache is not None
    precision = precision or "fp32"
    form = "cached" if from_engine and step_cache is not None else precision
    engine = output or default_output(checkpoint, form) if writes_engine else checkpoint
    plan, plan_path = None, default_plan_path(engine, sms)
    if tensorrt:
        check_plan_path(plan_path, force=force)
        runs_in = precision if writes_engine else read_bundle(engine).manifest.network.precision
        plan = prepare_plan(runs_in, library=library, sms=sms, capacity=capacity)
    if from_engine and writes_engine:
        _rewrite(
            checkpoint, engine, precision=precision, step_cache=step_cache, name=name, force=force,
            threads=threads,
        )  # fmt: skip
    elif writes_engine:
        from .pipeline import ExportOptions

        options = ExportOptions(
            sampler=sampler,
            steps=steps,
            spacing=spacing,
            guidance_scale=guidance_scale,
            precision=precision,
            step_cache=step_cache,
            tolerance=tolerance,
            threads=threads,
        )
        _export(checkpoint, engine, name=name, force=force, options=options)
    if plan is not None:
        _write_plan(plan, engine, plan_path)


def _export(
    checkpoint: Path, engine: Path, *, name: str | None, force: bool, options: ExportOptions
) -> None:
    from .pipeline import bundle_from_checkpoint

    begun = time.perf_counter()
    report = bundle_from_checkpoint(
        checkpoint, engine, name=name, force=force, options=options, progress=_progress
    )
    click.echo(str(report))
    _say_written(engine, begun)


def _rewrite(
    source: Path, engine: Path, *, precision: str, step_cache: int | None, name: str | None,
    force: bool, threads: int | None,
) -> None:  # fmt: skip
    from .again import bundle_from_engine

    begun = time.perf_counter()
    report = bundle_from_engine(
        source, engine, precision=precision, step_cache=step_cache, name=name, force=force,
        threads=threads, progress=_progress,
    )  # fmt: skip
    click.echo(str(report))
    _say_written(engine, begun)


def _write_plan(plan: PreparedPlan, engine: Path, path: Path) -> None:
    begun = time.perf_counter()
    plan.write(read_bundle(engine), path, notice=_progress)
    _say_written(path, begun)


def _refuse_strays(context: click.Context, *, from_engine: bool) -> None:
    """Refuse options that would change nothing.

    Raises:
        ConfigurationError: names the option, why it has no effect, and what to do.
    """
    asked = context.params
    if not asked["tensorrt"]:
        _refuse(context, _OF_A_PLAN, "says how a plan is built; add --tensorrt, or leave it out")
    if not from_engine:
        return
    source = str(asked["checkpoint"])
    _refuse(
        context,
        _OF_A_CHECKPOINT,
        f"is for the export of a checkpoint, and {source!r} is an engine, which keeps its own; "
        "leave it out",
    )
    if asked["precision"] is not None or asked["step_cache"] is not None:
        return
    if not asked["tensorrt"]:
        raise ConfigurationError(
            f"{source!r} is an engine already: give it to ddpm-run, or add --precision fp16 or "
            "bf16, --step-cache, or --tensorrt."
        )
    _refuse(
        context,
        _OF_WRITING,
        "is for writing an engine; add --precision or --step-cache, or leave it out",
    )


def _refuse(context: click.Context, names: tuple[str, ...], why: str) -> None:
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is ParameterSource.COMMANDLINE:
            raise ConfigurationError(f"{option.opts[-1]} {why}.")


def _progress(message: str) -> None:
    click.echo(message, err=True)


def _say_written(path: Path, begun: float) -> None:
    files = list(path.iterdir()) if path.is_dir() else [path]
    size_mb = sum(file.stat().st_size for file in files) / 1e6
    click.echo(f"{path}: {size_mb:.1f} MB in {time.perf_counter() - begun:.1f} s")
