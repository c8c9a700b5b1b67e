"""On a real GPU, rehearsed on the simulated one: noise bit for bit, chunks that wait for nothing.

Run on a machine with a GPU: ``python -m pytest tests/cuda -m gpu``. The network copies its input,
so nothing but cuda-bindings and a driver is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_cuda.programs import real_programs
from helpers_cuda.simulator import BLOCKING, SimulatedDriver

from ddpm_bench.gpu_exercise import CopyNetwork, exercise
from ddpm_bench.gpu_timing import ChunkTimer
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.errors import BackendUnavailableError
from ddpm_runtime.noise import noise

PROGRAM = real_programs(steps=20)["ddim, clip 1"]
ALLOCATING = {"cuMemAlloc", "cuMemFree", "cuMemAllocHost", "cuMemFreeHost", "cuModuleLoadData"}


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "rehearsal"])
def stage(request) -> Iterator[SimpleNamespace]:
    if request.param == "rehearsal":
        driver = SimulatedDriver(request.getfixturevalue("host_kernels"))
        with open_device(driver=driver.started()) as device:
            yield SimpleNamespace(device=device, images=((1, 2, 4), (1, 3, 3)), count=9)
        return
    try:
        device = open_device()
    except BackendUnavailableError as error:
        pytest.skip(f"no GPU: {error}")
    with device:
        yield SimpleNamespace(
            device=device, images=((3, 32, 32), (1, 28, 28), (3, 5, 5)), count=256
        )


@contextmanager
def counted(device, around) -> Iterator[list[str]]:
    """The driver's calls while a chunk is put on the stream."""
    driver, inside, listening = device.driver, [], []
    call = driver.call

    def listen(name, *arguments, **words):
        if listening:
            inside.append(name)
        return call(name, *arguments, **words)

    @contextmanager
    def chunk(stream):
        with around(stream):
            listening.append(True)
            yield
            listening.clear()

    driver.call = listen
    try:
        yield inside, chunk
    finally:
        del driver.call


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_every_kernel_gives_the_bits_of_the_host(stage, level):
    assert exercise(stage.device, level) == 14


def test_noise_is_the_hosts_bit_for_bit(stage):
    rng = np.random.default_rng(0)
    for image in stage.images:
        size = int(np.prod(image))
        keys = [(0, 0), (2**64 - 1, 2**64 - 1), (2**32, 1), (1, 2**32)]
        keys += [tuple(map(int, rng.integers(2**63, size=2))) for _ in range(stage.count - 4)]
        with CudaLanes(stage.device, CopyNetwork(stage.device, image), stage.count) as lanes:
            for seed, index in keys:
                lanes.start(PROGRAM, seed=seed, index=index, tag=(seed, index))
            found = lanes.images()
        scale = np.float32(PROGRAM.initial_scale)
        for seed, index in keys:
            expected = noise(seed, index, 0, size) * scale
            assert found[seed, index].tobytes() == expected.tobytes(), (seed, index)


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_a_chunk_never_waits_for_the_device(stage, level):
    rows = 16
    timer = ChunkTimer(stage.device)
    network = CopyNetwork(stage.device, stage.images[0])
    with (
        CudaLanes(stage.device, network, 4, graph_level=level) as lanes,
        counted(stage.device, timer.held) as (calls, chunk),
    ):
        lanes.warm_up()
        for index in range(4):
            lanes.start(PROGRAM, seed=0, index=index)
        lanes.around_chunk = chunk
        lanes.advance(rows)
        assert not timer.interrupted  # the stream was held until every row was on it
        assert timer.elapsed_ms() > 0
    assert not {*calls} & (BLOCKING | ALLOCATING)
    if level == "L0":
        assert calls == ["cuLaunchKernel", "cuMemcpyDtoDAsync", "cuLaunchKernel"] * rows
    elif level == "L1":
        assert calls == ["cuGraphLaunch"] * rows
    else:  # one call for the chunk and one for its count, or a graph for eight rows
        assert calls in (["cuMemsetD32Async", "cuGraphLaunch"], ["cuGraphLaunch"] * 2)
    timer.close()


def test_a_network_that_waits_is_caught(stage):
    """The negative control: without it, the test above could pass for want of looking."""
    network = CopyNetwork(stage.device, stage.images[0])
    copy = network.enqueue

    def wait(stream, rows):
        copy(stream, rows)
        stage.device.driver.call("cuStreamSynchronize", stream)

    network.enqueue = wait
    timer = ChunkTimer(stage.device, patience_s=0.2)
    with (
        CudaLanes(stage.device, network, 1, graph_level="L0") as lanes,
        counted(stage.device, timer.held) as (calls, chunk),
    ):
        lanes.warm_up()
        lanes.start(PROGRAM, seed=0, index=0)
        lanes.around_chunk = chunk
        lanes.advance(2)
        assert timer.interrupted
    assert calls.count("cuStreamSynchronize") == 2
    timer.close()
