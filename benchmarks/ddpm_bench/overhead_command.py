"""``ddpm-bench overhead``: one sampling step against the same ONNX file through plain ONNX Runtime.

Two sessions, nothing else in the process, in turn. Each waits until the other's threads, which
plain ONNX Runtime leaves waiting actively, have gone to sleep. The step includes the sampler's
update; the plain call does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.samplers import build_program

from .timing import SETTLE_S, interleave, ratio

__all__ = ["overhead_command"]


@click.command("overhead")
@click.option("--engine", "engine_path", required=True, type=click.Path(path_type=Path))
@click.option("--batch-size", "batch_sizes", multiple=True, default=(1, 8))
@click.option("--rounds", default=20, help="Of a step and a plain call.")
def overhead_command(engine_path: Path, batch_sizes: tuple[int, ...], rounds: int) -> None:
    """Compare a step of ours with one call of plain ONNX Runtime."""
    bundle = read_bundle(engine_path)
    for batch_size in batch_sizes:
        ours, plain = _ours(bundle, batch_size), _plain(bundle, batch_size)
        cases = {"ours": ours, "plain": plain}
        samples = interleave(cases, rounds=rounds, settle_s=SETTLE_S).samples_ms
        found = ratio(samples["ours"], samples["plain"])
        ms = {name: np.median(samples[name]) for name in cases}
        click.echo(
            f"batch {batch_size}: ours {ms['ours']:.2f} ms a step, plain {ms['plain']:.2f} ms a "
            f"call, ratio {found['p50']:.3f} ({found['p5']:.2f} to {found['p95']:.2f})"
        )


def _ours(bundle: Bundle, batch_size: int) -> Callable[[], object]:
    lanes = HostLanes(open_ort(bundle), batch_size)
    program = build_program(
        "ddim",
        schedule=bundle.schedule,
        prediction_type=bundle.manifest.network.prediction_type,
        num_inference_steps=bundle.schedule.num_train_timesteps,
    )

    def step() -> None:
        while lanes.free:
            lanes.start(program, seed=0, index=lanes.active)
        lanes.advance()

    return step


def _plain(bundle: Bundle, batch_size: int) -> Callable[[], object]:
    import onnxruntime

    image = bundle.manifest.image
    shape = (batch_size, image.channels, image.height, image.width)
    inputs = {
        "sample": np.random.default_rng(0).normal(size=shape).astype(np.float32),
        "timestep": np.full(batch_size, 500, np.float32),
    }
    if bundle.manifest.network.num_classes:
        inputs["label"] = np.zeros(batch_size, np.int64)
    session = onnxruntime.InferenceSession(bundle.network_bytes, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)
