"""Sample grids along the way, drawn by the runtime itself: no second sampler lives here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_runtime.backends.function import FunctionBackend
from ddpm_runtime.images import grid, save_png, to_uint8
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import NoiseSchedule

from .unet import UNet

__all__ = ["sample_images", "write_grid"]

_STEPS = 50
_CAPACITY = 64


def write_grid(path: Path, images: NDArray[np.uint8]) -> None:
    """Write images (N, H, W, C) as one PNG, ten to a row where there are more than nine.

    The folder is made if it is missing.

    Raises:
        OSError: the place is not writable.
    """
    path.parent.mkdir(exist_ok=True)
    save_png(path, grid(images, columns=10 if len(images) > 9 else None))


@torch.no_grad()
def sample_images(
    network: UNet,
    weights: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    prediction_type: str,
    *,
    count: int,
    seed: int = 0,
    steps: int = _STEPS,
    bf16: bool = False,
) -> NDArray[np.uint8]:
    """Draw images 0 … count − 1 of ``seed`` by DDIM, class i of image i in turn.

    Args:
        network: gives the shape; its mode is put back as it was.
        weights: the weights to use in place of the network's own (the moving average).
        schedule: the training schedule.
        prediction_type: what the network predicts.
        count: how many images.
        seed: images are a function of seed and number alone, so grids of successive steps show
            the same images growing better.
        steps: DDIM steps; no more than T are taken.
        bf16: evaluate under bfloat16 autocast.

    Returns:
        (count, H, W, C) uint8.
    """
    config, device = network.config, next(network.parameters()).device

    def evaluate(
        sample: NDArray[np.float32], timestep: NDArray[np.float32], label: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        inputs = tuple(torch.tensor(value, device=device) for value in (sample, timestep, label))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            prediction = torch.func.functional_call(network, dict(weights), inputs)
        result: NDArray[np.float32] = prediction.float().cpu().numpy()
        return result

    program = build_program(
        "ddim",
        schedule=schedule,
        prediction_type=prediction_type,
        num_inference_steps=min(steps, schedule.num_train_timesteps),
        spacing="trailing",
    )
    shape = (config.image_channels, config.image_size, config.image_size)
    backend = FunctionBackend(evaluate, shape, num_classes=config.num_classes)
    was_training = network.training
    network.eval()
    try:
        return to_uint8(_draw(backend, program, count, seed))
    finally:
        network.train(was_training)


def _draw(
    backend: FunctionBackend, program: SamplerProgram, count: int, seed: int
) -> NDArray[np.float32]:
    """Images 0 … count − 1: (count, C, H, W), NaN where the network gave it drawn as grey."""
    lanes = HostLanes(backend, min(count, _CAPACITY))
    classes = backend.shape.num_classes
    images = np.zeros((count, *backend.shape.image), np.float32)
    started = finished = 0
    while finished < count:
        while started < count and lanes.free:
            label = started % classes if classes else None
            lanes.start(program, seed=seed, index=started, label=label, tag=started)
            started += 1
        for done in lanes.advance():
            images[done.tag] = np.nan_to_num(done.image)
            finished += 1
    return images
