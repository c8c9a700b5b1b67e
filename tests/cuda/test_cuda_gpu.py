"""The same promises on a real GPU, and the same tests rehearsed on the simulated one.

Run on a machine with a GPU: ``python -m pytest tests/cuda -m gpu``. Where there is none the tests
on the GPU are skipped, naming what is missing; the rehearsal shows that the tests themselves work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from helpers_cuda.gpu_network import GpuNetwork, compile_network
from helpers_cuda.networks import smooth_network
from helpers_cuda.pairs import assert_same, requests, run
from helpers_cuda.programs import random_program, real_programs
from helpers_cuda.ptx import PtxKernels
from helpers_cuda.simulator import SimulatedDriver

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.cuda import CudaLanes, OutOfDeviceMemoryError, lanes_that_fit, open_device
from ddpm_runtime.cuda.compiler import compile_module
from ddpm_runtime.cuda.device import Device
from ddpm_runtime.errors import BackendUnavailableError
from ddpm_runtime.images import to_uint8
from ddpm_runtime.lanes import HostLanes, Known

LEVELS = ("L0", "L1", "L2")


@dataclass
class Stage:
    """Where the tests play, and how big."""

    device: Device
    images: tuple[tuple[int, int, int], ...]
    capacity: int
    count: int


class Rehearsal:
    """Our kernels through g++, the network's through the PTX interpreter."""

    def __init__(self, host_kernels) -> None:
        self.host, self.conditions = host_kernels, host_kernels.conditions
        ptx = compile_network("compute_90").rstrip(b"\0").decode()
        self.network = PtxKernels([ptx], lambda address: None)

    def launch(self, name, *arguments) -> None:
        (self.network if name == "test_network" else self.host).launch(name, *arguments)


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "rehearsal"])
def stage(request) -> Iterator[Stage]:
    if request.param == "rehearsal":
        kernels = Rehearsal(request.getfixturevalue("host_kernels"))
        driver = SimulatedDriver(kernels)
        kernels.network.region = driver.region
        with open_device(driver=driver.started()) as device:
            yield Stage(device, ((1, 2, 4), (1, 3, 3)), 3, 5)
        return
    try:
        device = open_device()
    except BackendUnavailableError as error:
        pytest.skip(f"no GPU: {error}")
    with device:
        yield Stage(device, ((3, 32, 32), (1, 28, 28), (3, 5, 5), (1, 1, 1)), 64, 150)


def compare(stage: Stage, image, programs, *, learned=False, level="auto", rows=7, **given) -> None:
    """The same requests through both executors: the same bits."""
    wanted = [
        {**request, **given}
        for request in requests(programs, count=stage.count, classes=5, guided=True)
    ]
    network = smooth_network(5, image[0] * (2 if learned else 1))
    backend = FunctionBackend(
        network, image, num_classes=5, prediction_channels=image[0] * (2 if learned else 1)
    )
    host = run(HostLanes(backend, stage.capacity), wanted)
    gpu = GpuNetwork(stage.device, image, num_classes=5, learned=learned)
    with CudaLanes(stage.device, gpu, stage.capacity, graph_level=level) as lanes:
        assert_same(host, run(lanes, wanted, rows=rows))


@pytest.mark.parametrize("level", LEVELS)
def test_every_sampler_gives_the_bits_of_the_host(stage, level):
    for image in stage.images:
        compare(stage, image, list(real_programs(steps=5).values()), level=level)


@pytest.mark.parametrize("learned", [False, True])
def test_random_tables_give_the_bits_of_the_host(stage, learned):
    programs = [random_program(1 + s % 4, 6, s, learned=learned) for s in range(8)]
    for image in stage.images:
        compare(stage, image, programs, learned=learned, rows=3)


def test_a_given_start_and_a_given_part_give_the_bits_of_the_host(stage):
    rng = np.random.default_rng(0)
    image = stage.images[0]
    start, known = rng.normal(size=(2, *image)).astype(np.float32)
    mask = rng.uniform(size=image).astype(np.float32)
    programs = list(real_programs(steps=4).values())
    compare(stage, image, programs, initial=start, known=Known(image=known, mask=mask))


def test_an_image_depends_on_nothing_but_itself(stage):
    image = stage.images[0]
    wanted = list(requests(real_programs(steps=4).values(), count=6, classes=5, guided=True))
    network = GpuNetwork(stage.device, image, num_classes=5, learned=False)
    results = []
    for capacity, rows in ((1, 1), (stage.capacity, 9), (3, 2)):
        with CudaLanes(stage.device, network, capacity) as lanes:
            results.append(run(lanes, wanted, rows=rows))
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_pixels_made_on_the_device_are_those_of_to_uint8(stage):
    image = stage.images[0]
    network = GpuNetwork(stage.device, image, num_classes=0, learned=False)
    wanted = list(requests(real_programs(steps=3).values(), count=stage.count))
    with CudaLanes(stage.device, network, stage.capacity) as lanes:
        floats, pixels = run(lanes, wanted, rows=4), run(lanes, wanted, rows=4, pixels=True)
    for tag, lane in floats.items():
        assert (pixels[tag].pixels == to_uint8(lane.image)).all()


def test_a_lane_that_breaks_fails_alone_and_at_its_row(stage):
    image = stage.images[0]
    programs = list(real_programs(steps=4).values())
    wanted = list(requests(programs, count=4))
    wanted[1]["initial"] = np.full(image, np.nan, np.float32)
    backend = FunctionBackend(smooth_network(), image)
    host = run(HostLanes(backend, 4), wanted)
    network = GpuNetwork(stage.device, image, num_classes=0, learned=False)
    with CudaLanes(stage.device, network, 4) as lanes:
        cuda = run(lanes, wanted, rows=9)
    assert [cuda[i].failed_row for i in range(4)] == [None, 0, None, None]
    assert_same(host, cuda)


def test_the_highest_level_works_and_the_shipped_kernels_are_used(stage):
    network = GpuNetwork(stage.device, stage.images[0], num_classes=0, learned=False)
    with CudaLanes(stage.device, network, 1) as lanes:
        lanes.warm_up()
        assert lanes.description.startswith("L2, one graph with a conditional loop; kernels sm_")
        assert lanes.description.endswith(", shipped")


def test_kernels_compiled_here_load(stage):
    for module in ("step", "loop"):
        stage.device.load(compile_module(module, stage.device.sm).image).close()


def test_more_lanes_than_the_device_holds_are_halved_or_refused(stage):
    image = (64, 1024, 1024)  # 268 MB a lane and register
    network = GpuNetwork(stage.device, image, num_classes=0, learned=False)

    def make(capacity: int) -> CudaLanes:
        return CudaLanes(stage.device, network, capacity)

    with pytest.raises(OutOfDeviceMemoryError, match="neither 60000 nor 30000"):
        lanes_that_fit(make, 60_000)
    small = GpuNetwork(stage.device, stage.images[0], num_classes=0, learned=False)
    with CudaLanes(stage.device, small, 1) as lanes:  # the device is as good as before
        run(lanes, requests(real_programs(steps=2).values(), count=1), rows=2)
