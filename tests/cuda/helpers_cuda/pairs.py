"""The same requests through both executors, compared bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.lanes import HostLanes

from .networks import SimulatedBackend, smooth_network
from .simulator import SimulatedDriver

Request = dict[str, Any]


def requests(programs: Iterable, *, count: int, classes: int = 0, guided: bool = False):
    """``count`` requests that differ in everything a lane has of its own."""
    made = list(programs)
    for i in range(count):
        request = {"program": made[i % len(made)], "seed": 3 + i % 2, "index": i, "tag": i}
        if classes:
            request["label"] = i % classes
            request["guidance_scale"] = (1.0, 2.5, 0.0)[i % 3] if guided else 1.0
        yield request


def start(lanes: Any, request: Request) -> None:
    request = dict(request)
    lanes.start(request.pop("program"), **request)


def run(lanes: Any, wanted: Iterable[Request], *, rows: int = 1, **options: Any) -> dict[Any, Any]:
    """Keep the lanes full until every request is done, as Engine does; finished by tag."""
    waiting, done = list(wanted), {}
    while waiting or lanes.active:
        while waiting and lanes.free:
            start(lanes, waiting.pop(0))
        finished = lanes.advance(rows, **options) if rows > 1 or options else lanes.advance()
        done.update({lane.tag: lane for lane in finished})
    return done


def both(
    kernels: Any,
    wanted: Iterable[Request],
    image: tuple[int, int, int],
    *,
    capacity: int,
    rows: int = 1,
    num_classes: int = 0,
    prediction_channels: int | None = None,
    network: Any = None,
    **options: Any,
) -> tuple[dict[Any, Any], dict[Any, Any], SimulatedDriver]:
    """Finished lanes of HostLanes and of CudaLanes on the simulated device."""
    wanted = list(wanted)
    shape = {"num_classes": num_classes, "prediction_channels": prediction_channels}
    network = network or smooth_network(num_classes, prediction_channels)
    with np.errstate(all="ignore"):
        host = run(HostLanes(FunctionBackend(network, image, **shape), capacity), wanted)
        driver = SimulatedDriver(kernels)
        kernels.region = driver.region  # the interpreter's bounds are the device's allocations
        with open_device(driver=driver.started()) as device:
            backend = SimulatedBackend(driver, network, image, **shape)
            with CudaLanes(device, backend, capacity, **options) as lanes:
                cuda = run(lanes, wanted, rows=rows)
                driver.check_memory()
    return host, cuda, driver


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal bit for bit, NaN of any kind being NaN."""
    a, b = one.view(np.uint32).copy(), other.view(np.uint32).copy()
    a[np.isnan(one)] = b[np.isnan(other)] = 0x7FC00000
    return bool((a == b).all())


def assert_same(host: dict[Any, Any], cuda: dict[Any, Any]) -> None:
    assert host.keys() == cuda.keys()
    for tag, expected in host.items():
        found = cuda[tag]
        assert found.failed_row == expected.failed_row, f"image {tag}"
        assert same_bits(found.image, expected.image), f"image {tag}"
