"""A command: real TensorRT-RTX plans, ahead of time and without a GPU, and what they cost.

    python -m ddpm_export.plan_table untrained-cifar10
    python -m ddpm_export.plan_table fashion-mnist.engine --bucket 1 --bucket 8 --sm 89

``untrained-cifar10`` is Ho et al.'s network (35.7 M parameters) with random weights; a plan does
not depend on their values. Seconds are of this machine's processors.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.console import run_command
from ddpm_runtime.errors import ConfigurationError, DDPMError
from ddpm_runtime.plans import PlanSpec, TensorRT, load_library, plan_from_onnx

from .destination import PRECISIONS
from .precision import lower_precision
from .precision_table import CIFAR10, untrained_bundle

__all__ = ["plan_table"]

_SMS = ("80", "86", "89", "120", "90")  # the last one is refused


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("engine")
@click.option("--precision", "precisions", type=click.Choice(PRECISIONS), multiple=True,
              default=PRECISIONS, help="Which ones.")  # fmt: skip
@click.option("--sm", "targets", multiple=True, default=_SMS,
              help="Compute capability times ten; commas put several into one plan.")  # fmt: skip
@click.option("--bucket", "buckets", type=int, multiple=True, default=(16,), help="Batch sizes.")
@click.option("--json", "output", type=click.Path(path_type=Path), default=None,
              help="Write the table there too.")  # fmt: skip
def plan_table(
    engine: str,
    precisions: tuple[str, ...],
    targets: tuple[str, ...],
    buckets: tuple[int, ...],
    output: Path | None,
) -> None:
    """Build plans of ENGINE (a float32 bundle, or "untrained-cifar10") with TensorRT-RTX."""
    library = load_library("tensorrt_rtx")
    bundle = untrained_bundle(CIFAR10) if engine == "untrained-cifar10" else read_bundle(engine)
    if bundle.manifest.network.precision != "fp32":
        raise ConfigurationError("give a float32 bundle; this command lowers it itself.")
    click.echo(f"{engine}, {library.title}, batch sizes {', '.join(map(str, buckets))}")
    click.echo(
        f"{'precision':>9}  {'SM':>12}  {'ONNX MB':>8}  {'plan MB':>8}  {'build s':>8}  layers"
    )
    rows = []
    for precision in precisions:
        network = lower_precision(bundle.network_bytes, precision)
        for target in targets:
            row = _build(library, network, precision, target, tuple(sorted({*buckets})))
            rows.append(row)
            click.echo(_line(row))
    if output is not None:
        report = {"engine": engine, "library": library.title, "buckets": buckets, "plans": rows}
        output.write_text(json.dumps(report, indent=2) + "\n")


def _build(
    library: TensorRT, network: bytes, precision: str, target: str, buckets: tuple[int, ...]
) -> dict[str, Any]:
    row: dict[str, Any] = {"precision": precision, "sm": target, "onnx_bytes": len(network)}
    try:
        sms = tuple(sorted(int(sm) for sm in target.split(",")))
        spec = PlanSpec(buckets=buckets, precision=precision, sms=sms)
        built = plan_from_onnx(library, network, spec)
    except DDPMError as error:
        return {**row, "refused": str(error)}
    return {
        **row,
        "plan_bytes": len(built.payload),
        "build_seconds": built.seconds,
        "layers": built.layers,
    }


def _line(row: dict[str, Any]) -> str:
    start = f"{row['precision']:>9}  {row['sm']:>12}  {row['onnx_bytes'] / 1e6:>8.1f}  "
    if "refused" in row:
        return f"{start}refused: {row['refused']}"
    plan_mb, seconds = row["plan_bytes"] / 1e6, row["build_seconds"]
    return f"{start}{plan_mb:>8.1f}  {seconds:>8.1f}  {row['layers']:>6}"


if __name__ == "__main__":
    sys.exit(run_command(plan_table))
