"""A command: what fp16 and bf16 cost an engine, on this machine's CPU.

    python -m ddpm_export.precision_table fashion-mnist.engine
    python -m ddpm_export.precision_table untrained-cifar10 --rows 2

``untrained-cifar10`` is Ho et al.'s network (35.7 M parameters) with random weights: its errors of
an evaluation are those of the arithmetic; its images are no images.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click
import torch
from torch import nn

from ddpm_runtime.bundle import Bundle, Defaults, Image, Manifest, Network, read_bundle
from ddpm_runtime.console import run_command
from ddpm_runtime.schedule import make_schedule
from ddpm_train.unet import UNet, UNetConfig

from .onnx_graph import OPSET, onnx_from_network
from .precision_report import measure_precision

__all__ = ["CIFAR10", "untrained_bundle"]

CIFAR10 = UNetConfig(image_size=32, image_channels=3)
"""Ho et al.'s CIFAR-10 network."""


def untrained_bundle(config: UNetConfig, *, seed: int = 0) -> Bundle:
    """A bundle in memory around a U-Net with random weights, none of them zero.

    Layers that training starts at zero get PyTorch's ordinary start, else the network would
    predict exactly zero and nothing could be compared.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(config).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and not bool(module.weight.any()):
                module.reset_parameters()
    image = (config.image_channels, config.image_size, config.image_size)
    manifest = Manifest(
        name="untrained",
        image=Image(height=config.image_size, width=config.image_size, channels=image[0]),
        network=Network(prediction_type="epsilon", num_classes=config.num_classes, opset=OPSET),
        schedule={"name": "linear", "num_train_timesteps": 1000},
        defaults=Defaults(),
    )
    return Bundle(
        manifest=manifest,
        network_bytes=onnx_from_network(network, image, num_classes=config.num_classes),
        schedule=make_schedule(**manifest.schedule),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("engine")
@click.option("--precision", "precisions", type=click.Choice(["fp16", "bf16"]), multiple=True,
              default=("fp16", "bf16"), help="Which ones.")  # fmt: skip
@click.option("--native", is_flag=True, help="Add ONNX Runtime's own float16.")
@click.option("--rows", type=click.IntRange(1), default=4, help="Images of every evaluation.")
@click.option("--threads", type=click.IntRange(1), default=None, help="Of ONNX Runtime.")
@click.option("--json", "output", type=click.Path(path_type=Path), default=None,
              help="Write the figures there too.")  # fmt: skip
def precision_table(
    engine: str,
    precisions: tuple[str, ...],
    native: bool,
    rows: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Compare ENGINE (a bundle, or "untrained-cifar10") with itself in sixteen bits."""
    bundle = untrained_bundle(CIFAR10) if engine == "untrained-cifar10" else read_bundle(engine)
    ways = [(precision, False) for precision in precisions]
    ways += [("fp16", True)] if native else []
    reports = []
    for precision, natively in ways:
        begun = time.perf_counter()
        report = measure_precision(
            bundle,
            precision,
            native=natively,
            rows=rows,
            threads=threads,
            progress=lambda message: click.echo(message, err=True),
        )
        reports.append(report.to_dict())
        click.echo(f"{report}\nmeasured in {time.perf_counter() - begun:.1f} s\n")
    if output is not None:
        output.write_text(json.dumps({"engine": engine, "reports": reports}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(precision_table))
