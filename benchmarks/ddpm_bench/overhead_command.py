"""``ddpm-bench overhead``: one sampling step against the same ONNX file through plain ONNX Runtime.

Two sessions, nothing else in the process: runs of a few steps of one, then as many calls of the
other, in turn. The step includes the sampler's update; the plain call does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.samplers import build_program

__all__ = ["overhead_command"]

_CALLS = 4


@click.command("overhead")
@click.option("--engine", "engine_path", required=True, type=click.Path(path_type=Path))
@click.option("--batch-size", "batch_sizes", multiple=True, default=(1, 8))
@click.option("--rounds", default=20, help="Of four steps and four plain calls.")
def overhead_command(engine_path: Path, batch_sizes: tuple[int, ...], rounds: int) -> None:
    """Compare a step of ours with one call of plain ONNX Runtime."""
    bundle = read_bundle(engine_path)
    for batch_size in batch_sizes:
        ours, plain = _ours(bundle, batch_size), _plain(bundle, batch_size)
        samples = np.array([[_time(ours), _time(plain)] for _ in range(rounds + 1)])[1:]
        ratios = samples[:, 0] / samples[:, 1]
        low, high = np.percentile(ratios, (5, 95))
        ms = 1e3 * np.median(samples, axis=0)
        click.echo(
            f"batch {batch_size}: ours {ms[0]:.2f} ms a step, plain {ms[1]:.2f} ms a call, "
            f"ratio {np.median(ratios):.3f} ({low:.2f} to {high:.2f})"
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


def _time(call: Callable[[], object]) -> float:
    """Seconds a call, the mean of a few."""
    began = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - began) / _CALLS
