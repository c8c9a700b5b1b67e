"""Every kernel on the device, small, against the host bit for bit; no inference library needed.

The network is a copy of its input, which both sides can do. Made for compute-sanitizer:
``compute-sanitizer python -m ddpm_bench.gpu_exercise --level L0``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.console import run_command
from ddpm_runtime.cuda import CudaLanes, DeviceBuffers
from ddpm_runtime.cuda.device import Device, open_device
from ddpm_runtime.errors import BackendError
from ddpm_runtime.lanes import HostLanes, Known
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule

from .gpu_matrix import LEVELS

__all__ = ["CopyNetwork", "exercise"]

_IMAGES = ((3, 8, 8), (1, 5, 7))  # four values at once, and one at a time
_CAPACITY, _COUNT, _CLASSES = 3, 7, 4
_SAMPLERS = ("ddim", "ddpm", "dpmpp_2m", "heun")


class CopyNetwork:
    """A network that answers with its input: a DeviceBackend and its binding."""

    name, description, capture_safe = "copy", "a copy on the device", True

    def __init__(
        self, device: Device, image: tuple[int, int, int], *, num_classes: int = 0
    ) -> None:
        self.shape = NetworkShape(
            image=image, prediction_channels=image[0], num_classes=num_classes
        )
        self._driver = device.driver
        self._row_bytes = 4 * int(np.prod(image))

    def bind(self, buffers: DeviceBuffers) -> CopyNetwork:
        """Take the addresses: of one set of lanes at a time."""
        self._buffers = buffers
        return self

    def prepare(self, stream: int, rows: int) -> None:
        """Nothing to get ready."""

    def enqueue(self, stream: int, rows: int) -> None:
        """Copy the rows, in stream order."""
        size = rows * self._row_bytes
        buffers = self._buffers
        self._driver.call("cuMemcpyDtoDAsync", buffers.prediction, buffers.sample, size, stream)

    def close(self) -> None:
        """Nothing to release."""


def exercise(device: Device, level: str) -> int:
    """Draw some images of every kind at a graph level, on the device and on the host.

    Args:
        device: where.
        level: "L0", "L1" or "L2".

    Returns:
        How many were compared.

    Raises:
        BackendError: an image differs from the host's in some bit.
    """
    compared = 0
    for image in _IMAGES:
        network = CopyNetwork(device, image, num_classes=_CLASSES)
        host = HostLanes(FunctionBackend(_copy, image, num_classes=_CLASSES), _CAPACITY)
        with CudaLanes(device, network, _CAPACITY, graph_level=level) as lanes:
            expected, found = _run(host, image), _run(lanes, image, rows=3)
            previews = _run(lanes, image, rows=50, pixels=True)
        for tag, one in expected.items():
            same = found[tag].image.tobytes() == one.image.tobytes()
            if not (same and (previews[tag].pixels == one.pixels).all()):
                raise BackendError(
                    f"image {tag} of shape {image} at level {level} is not the host's bit for bit. "
                    "Run the command under compute-sanitizer, and report this with the GPU's name."
                )
        compared += len(expected)
    return compared


@click.command("gpu-exercise")
@click.option("--level", "levels", type=click.Choice(LEVELS), multiple=True, default=LEVELS)
def exercise_command(levels: tuple[str, ...]) -> None:
    """Run every kernel on small images and compare with the host."""
    with open_device() as device:
        for level in levels:
            count = exercise(device, level)
            click.echo(f"{level}: {count} images on {device.name}, bit for bit the host's")


def _copy(
    sample: NDArray[np.float32], timestep: NDArray[np.float32], label: NDArray[np.int64]
) -> NDArray[np.float32]:
    return sample


def _run(lanes: Any, image: tuple[int, int, int], rows: int = 1, **options: Any) -> dict[int, Any]:
    """Keep the lanes full until every request is done; finished lanes by tag."""
    waiting, done = list(_requests(image)), {}
    while waiting or lanes.active:
        while waiting and lanes.free:
            lanes.start(**waiting.pop(0))
        done.update({lane.tag: lane for lane in lanes.advance(rows, **options)})
    return done


def _requests(image: tuple[int, int, int]) -> Iterator[dict[str, Any]]:
    """Samplers with noise and with history, guidance, a given start, a given part."""
    schedule = make_schedule(num_train_timesteps=100)
    draws = np.random.default_rng(0)
    for index in range(_COUNT):
        program = build_program(
            _SAMPLERS[index % len(_SAMPLERS)],
            schedule=schedule,
            prediction_type="epsilon",
            num_inference_steps=5,
        )
        request: dict[str, Any] = {"program": program, "seed": 2**40 + index, "index": 2**35}
        request |= {"tag": index, "label": index % _CLASSES}
        request["guidance_scale"] = (1.0, 2.5)[index % 2]
        if index % 3 == 1:
            request["initial"] = draws.standard_normal(image, np.float32)
        if index % 3 == 2:
            mask = (draws.random(image) < 0.5).astype(np.float32)
            request["known"] = Known(image=draws.standard_normal(image, np.float32), mask=mask)
        yield request


if __name__ == "__main__":
    sys.exit(run_command(exercise_command))
