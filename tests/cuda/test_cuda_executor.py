"""CudaLanes as an owner of resources: refusals, memory, failures in flight, wrong order."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from helpers_cuda.networks import SimulatedBackend, smooth_network
from helpers_cuda.pairs import assert_same, both, requests, run, start
from helpers_cuda.programs import random_program, real_programs
from helpers_cuda.simulator import Code, SimulatedDriver

from ddpm_runtime.cuda import CudaLanes, OutOfDeviceMemoryError, lanes_that_fit, open_device
from ddpm_runtime.cuda.layout import pack_rows
from ddpm_runtime.errors import BackendError, ConfigurationError, LifecycleError
from ddpm_runtime.lanes import Known

IMAGE = (1, 4, 4)
PROGRAM = random_program(2, 6, 0, always_asks=True)


@pytest.fixture
def driver(host_kernels):
    return SimulatedDriver(host_kernels)


@pytest.fixture
def device(driver):
    with open_device(driver=driver.started()) as opened:
        yield opened


@pytest.fixture
def backend(driver):
    return SimulatedBackend(driver, smooth_network(), IMAGE)


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, -1, 65_536])
def test_a_capacity_out_of_range_is_refused(device, backend, capacity):
    with pytest.raises(ConfigurationError, match=rf"batch size must be in .*; got {capacity}"):
        CudaLanes(device, backend, capacity)


@pytest.mark.parametrize("buckets", [(), (0, 4), (1, 2)])
def test_buckets_that_do_not_hold_the_lanes_are_refused(device, backend, buckets):
    with pytest.raises(ConfigurationError, match="the largest hold 4 network rows"):
        CudaLanes(device, backend, 4, buckets=buckets)


def test_starting_more_lanes_than_there_are_says_what_to_call(device, backend):
    with CudaLanes(device, backend, 1) as lanes:
        lanes.start(PROGRAM, seed=0, index=0)
        with pytest.raises(LifecycleError, match=r"all 1 lanes are in flight; call advance\(\)"):
            lanes.start(PROGRAM, seed=0, index=1)


def test_programs_that_do_not_fit_are_refused(device, backend):
    with CudaLanes(device, backend, 1, registers=1) as lanes:
        with pytest.raises(ConfigurationError, match="Make them with registers=2"):
            lanes.start(PROGRAM, seed=0, index=0)
        with pytest.raises(ConfigurationError, match="predicts 2 channels, half of them the vari"):
            lanes.start(random_program(1, 3, 0, learned=True), seed=0, index=0)
        with pytest.raises(ConfigurationError, match="unconditional network"):
            lanes.start(random_program(1, 3, 0), seed=0, index=0, guidance_scale=2.0)
        with pytest.raises(ConfigurationError, match="rows must be ≥ 1; got 0"):
            lanes.advance(0)
        assert lanes.active == 0


def test_a_row_that_uses_an_answer_nobody_asked_for_is_refused(device, backend):
    program = random_program(1, 10, 3)
    row = int(np.argmin(program.evaluates))
    program.weights[row, 0, -2] = 0.5
    with (
        CudaLanes(device, backend, 1) as lanes,
        pytest.raises(ConfigurationError, match=f"row {row} .* mark it in `evaluates`"),
    ):
        lanes.start(program, seed=0, index=0)


def test_every_sampler_packs_without_losing_a_bit():
    made = [*real_programs(steps=8).values(), *(random_program(k, 9, k) for k in (1, 2, 3, 4))]
    for program in made:
        rows, table, own = pack_rows(program), program.table, program.registers
        assert (rows["weights"][:, :own, :own] == table.weights[:, :, :own]).all()
        assert (rows["weights"][:, :own, 4:] == table.weights[:, :, own:]).all()
        assert (rows["weights"][:, own:] == 0).all()
        assert ((rows["flags"] & 1 > 0) == table.evaluates).all()
        assert ((rows["flags"] & 2 > 0) == table.guided).all()
        for name in ("input_scale", "x0_from_x", "x0_from_m", "clip"):
            assert (rows[name] == getattr(table, name)).all()
        assert (rows["timestep"] == table.timesteps).all()
        assert (rows["signal"] == table.signal[1:]).all()


# --- memory -----------------------------------------------------------------------------------


def test_closing_gives_everything_back_and_may_be_done_twice(driver, device, backend):
    before_memory, before_handles = set(driver.memory), set(driver.handles)
    lanes = CudaLanes(device, backend, 3)
    known = Known(image=np.zeros(IMAGE, "f4"), mask=np.ones(IMAGE, "f4"))
    for request in requests([PROGRAM, random_program(1, 4, 1)], count=3):
        start(lanes, {**request, "known": known})
    lanes.advance(2)
    lanes.close()
    lanes.close()
    assert set(driver.memory) == before_memory
    assert set(driver.handles) == before_handles
    assert backend.bindings == 0
    for call in (
        lanes.advance,
        lanes.images,
        lanes.warm_up,
        lambda: lanes.start(PROGRAM, seed=0, index=0),
    ):
        with pytest.raises(LifecycleError, match="these lanes are closed"):
            call()


def test_running_out_of_memory_anywhere_leaves_nothing_allocated(driver, device, backend):
    before_memory, before_handles = set(driver.memory), set(driver.handles)
    made, messages = 0, []
    for after in range(40):
        for function in ("cuMemAlloc", "cuMemAllocHost"):
            driver.fail(function, Code.CUDA_ERROR_OUT_OF_MEMORY, after=after)
            try:
                CudaLanes(device, backend, 3).close()
                made += 1
            except OutOfDeviceMemoryError as error:
                messages.append(str(error))
            assert set(driver.memory) == before_memory
            assert set(driver.handles) == before_handles
            assert backend.bindings == 0
    assert 40 < made < 80
    assert all("bytes" in m and "Choose a smaller batch size" in m for m in messages)


def test_lanes_that_do_not_fit_are_halved_once_and_give_the_same_images(host_kernels, caplog):
    image, wanted = (3, 16, 16), list(requests(real_programs().values(), count=9))
    host, _, _ = both(host_kernels, wanted, image, capacity=8)
    driver = SimulatedDriver(host_kernels, memory_bytes=180_000)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), image)
        with pytest.raises(OutOfDeviceMemoryError):
            CudaLanes(device, backend, 8)
        with lanes_that_fit(lambda capacity: CudaLanes(device, backend, capacity), 8) as lanes:
            assert lanes.capacity == 4
            cuda = run(lanes, wanted, rows=5)
    assert_same(host, cuda)
    assert "8 lanes do not fit; going on with 4" in caplog.text


@pytest.mark.parametrize(("capacity", "message"), [(64, "neither 64 nor 32"), (1, "allocate")])
def test_lanes_are_halved_only_once(driver, device, backend, capacity, message):
    driver.memory_bytes = 500
    tried = []

    def make(size):
        tried.append(size)
        return CudaLanes(device, backend, size)

    with pytest.raises(OutOfDeviceMemoryError, match=message):
        lanes_that_fit(make, capacity)
    assert tried == ([64, 32] if capacity == 64 else [1])


def test_a_program_table_is_uploaded_once_and_old_ones_are_let_go(driver, device, backend):
    with CudaLanes(device, backend, 2) as lanes:
        run(lanes, requests([PROGRAM], count=6))
        held = len(driver.memory)
        for seed in range(200):
            lanes.start(random_program(1, 2, seed), seed=0, index=0)
            lanes.advance(2)
        assert len(driver.memory) - held < 64
        lanes.start(PROGRAM, seed=0, index=0, tag="long")
        for seed in range(200):  # one in use is never let go
            lanes.start(random_program(1, 1, seed), seed=0, index=0)
            if seed % 50 == 0:
                lanes.advance()
            lanes.cancel(lambda tag: tag != "long")
        assert len(run(lanes, [])) == 1


# --- failures in flight -----------------------------------------------------------------------


@pytest.mark.parametrize("failing_row", [0, 2])
def test_a_network_that_fails_leaves_every_lane_where_its_last_row_ended(host_kernels, failing_row):
    wanted = list(requests([PROGRAM, random_program(1, 5, 2, always_asks=True)], count=3))
    host, _, _ = both(host_kernels, wanted, IMAGE, capacity=3)
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), IMAGE)
        with CudaLanes(device, backend, 3, graph_level="L0") as lanes:
            for request in wanted:
                start(lanes, request)
            binding, calls = lanes._row._binding, []
            enqueue = binding.enqueue

            def failing(stream, rows):
                calls.append(rows)
                if len(calls) == failing_row + 1:
                    raise BackendError("the library failed")
                enqueue(stream, rows)

            binding.enqueue = failing
            with pytest.raises(BackendError, match="the library failed"):
                lanes.advance(4)
            assert lanes.active == 3
            assert_same(host, run(lanes, []))  # goes on as if nothing had happened


def test_a_lane_that_broke_in_a_chunk_that_failed_is_still_handed_out(host_kernels):
    broken = lambda sample, timestep, label: sample * np.float32(np.nan)  # noqa: E731
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, broken, IMAGE)
        with CudaLanes(device, backend, 2, graph_level="L0") as lanes:
            lanes.start(PROGRAM, seed=0, index=0, tag="first")
            lanes._loop.get_ready(2)
            driver.fail("cuLaunchKernel", Code.CUDA_ERROR_LAUNCH_FAILED, after=4)
            with pytest.raises(
                BackendError, match=r"CUDA_ERROR_LAUNCH_FAILED .* compute-sanitizer"
            ):
                lanes.advance(3)
            lanes.start(PROGRAM, seed=0, index=1, tag="second")
            first, second = lanes.advance()
            assert (first.tag, first.failed_row) == ("first", 0)
            assert (second.tag, second.failed_row) == ("second", 0)


def test_any_thread_may_call(host_kernels, device, backend):
    wanted = list(requests([PROGRAM], count=3))
    host, _, _ = both(host_kernels, wanted, IMAGE, capacity=2)
    done = {}
    with CudaLanes(device, backend, 2) as lanes:
        worker = threading.Thread(target=lambda: done.update(run(lanes, wanted, rows=2)))
        worker.start()
        worker.join()
        assert_same(host, done)


def test_an_image_asked_for_in_the_other_kind_says_how_to_get_it(device, backend):
    with CudaLanes(device, backend, 1) as lanes:
        for pixels, attribute, call in (
            (False, "pixels", r"advance\(pixels=True\)"),
            (True, "image", r"advance\(\)"),
        ):
            lanes.start(PROGRAM, seed=0, index=0)
            (finished,) = lanes.advance(99, pixels=pixels)
            with pytest.raises(LifecycleError, match=call):
                getattr(finished, attribute)


def test_the_copy_of_finished_images_is_not_waited_for(driver, device, backend):
    with CudaLanes(device, backend, 1) as lanes:
        lanes.start(PROGRAM, seed=0, index=0)
        (first,) = lanes.advance(99)
        lanes.start(PROGRAM, seed=0, index=1)
        start_of_second = len(driver.log)
        lanes.advance(99)
        waits = [c for c in driver.log[start_of_second:] if c == "cuEventSynchronize"]
        assert len(waits) == 1  # for the chunk; none for the first image's copy
        assert np.isfinite(first.image).all()
        assert driver.log[-1] == "cuEventSynchronize"


def test_the_description_names_the_level_and_the_kernels(device, backend):
    with CudaLanes(device, backend, 1) as lanes:
        lanes.warm_up()
        assert lanes.description == (
            "L2, one graph with a conditional loop; kernels sm_90, shipped"
        )
