"""CudaLanes against HostLanes, bit for bit, where g++ and a simulated driver stand for the device.

Everything but the GPU is real here: the kernels' source, the executor, its memory, its graphs.
"""

from __future__ import annotations

import numpy as np
import pytest
from helpers_cuda.networks import SimulatedBackend, smooth_network
from helpers_cuda.pairs import assert_same, both, requests, run, same_bits, start
from helpers_cuda.programs import random_program, real_programs
from helpers_cuda.simulator import SimulatedDriver

from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.images import to_uint8
from ddpm_runtime.lanes import HostLanes, Known

IMAGE = (2, 4, 6)  # 48 values: four at once
ODD_IMAGE = (3, 5, 5)  # 75 values: one at a time
REAL = real_programs()
RNG = np.random.default_rng(1)


@pytest.mark.parametrize("image", [IMAGE, ODD_IMAGE, (1, 1, 1), (1, 33, 32)])
def test_every_sampler_gives_the_bits_of_the_host(host_kernels, image):
    host, cuda, _ = both(host_kernels, requests(REAL.values(), count=len(REAL)), image, capacity=5)
    assert len(cuda) == len(REAL) > 10
    assert_same(host, cuda)


@pytest.mark.parametrize("registers", [1, 2, 3, 4])
@pytest.mark.parametrize("image", [IMAGE, ODD_IMAGE], ids=["vector", "scalar"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("noisy", [False, True], ids=["silent", "noisy"])
def test_random_tables_give_the_bits_of_the_host(host_kernels, registers, image, learned, noisy):
    programs = [random_program(registers, 7, s, learned=learned, noisy=noisy) for s in range(4)]
    host, cuda, _ = both(
        host_kernels,
        requests(programs, count=6, classes=10, guided=True),
        image,
        capacity=4,
        num_classes=10,
        prediction_channels=image[0] * (2 if learned else 1),
    )
    assert_same(host, cuda)


def test_fixed_and_learned_variance_share_a_network(host_kernels):
    programs = [random_program(2, 6, s, learned=s % 2 == 0) for s in range(4)]
    host, cuda, _ = both(
        host_kernels,
        requests([*programs, *REAL.values()], count=12),
        ODD_IMAGE,
        capacity=5,
        rows=2,
        prediction_channels=6,
    )
    assert_same(host, cuda)


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
@pytest.mark.parametrize("rows", [1, 3, 50])
def test_chunks_of_any_length_at_any_graph_level_give_the_same_images(host_kernels, level, rows):
    programs = [random_program(k, length, k) for k, length in ((1, 5), (4, 12), (2, 9), (3, 1))]
    wanted = list(requests([*programs, *REAL.values()], count=12, classes=4, guided=True))
    host, cuda, _ = both(
        host_kernels,
        wanted,
        IMAGE,
        capacity=5,
        rows=rows,
        num_classes=4,
        graph_level=level,
    )
    assert_same(host, cuda)


@pytest.mark.parametrize("image", [IMAGE, ODD_IMAGE], ids=["vector", "scalar"])
def test_a_given_start_and_a_given_part_give_the_bits_of_the_host(host_kernels, image):
    draw = lambda: RNG.normal(size=image).astype(np.float32)  # noqa: E731
    wanted = list(requests(REAL.values(), count=6))
    for i, request in enumerate(wanted):
        if i % 3 != 1:
            request["initial"] = draw()
        if i % 2:
            mask = RNG.uniform(size=image).astype(np.float32).round(i % 3)
            request["known"] = Known(image=draw(), mask=mask)
    host, cuda, _ = both(host_kernels, wanted, image, capacity=4, rows=2)
    assert_same(host, cuda)


def test_a_lane_that_breaks_fails_alone_and_at_its_row(host_kernels):
    smooth = smooth_network()

    def network(sample, timestep, label):
        answer = smooth(sample, timestep, label)
        return np.where(sample.max(axis=(1, 2, 3), keepdims=True) > 3.2, np.nan, answer).astype(
            "f4"
        )

    programs = [random_program(2, 12, 5, always_asks=True), *REAL.values()]
    wanted = list(requests(programs, count=24))
    for level, rows in (("L0", 1), ("L2", 5)):
        host, cuda, _ = both(
            host_kernels,
            wanted,
            IMAGE,
            capacity=6,
            rows=rows,
            network=network,
            graph_level=level,
        )
        failed = [tag for tag, lane in host.items() if lane.failed_row is not None]
        assert 0 < len(failed) < len(wanted)
        assert_same(host, cuda)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("clip", [1.0, np.inf])
def test_nan_and_infinity_of_the_network_pass_or_are_clipped_as_on_the_host(
    host_kernels, poison, clip
):
    def network(sample, timestep, label):
        answer = sample * np.float32(0.5)
        answer[:, :, 0, 0] = poison
        return answer

    program = REAL[f"ddim, clip {clip:g}"]
    host, cuda, _ = both(
        host_kernels, requests([program], count=1), IMAGE, capacity=1, network=network
    )
    assert_same(host, cuda)
    assert (host[0].failed_row is None) == (clip == 1.0 and not np.isnan(poison))


def test_an_image_depends_on_nothing_but_itself(host_kernels):
    wanted = list(requests(REAL.values(), count=10, classes=4, guided=True))
    options = {"num_classes": 4, "rows": 3}
    alone, _, _ = both(host_kernels, wanted, IMAGE, capacity=1, **options)
    _, together, _ = both(host_kernels, wanted, IMAGE, capacity=10, **options)
    _, reversed_, _ = both(host_kernels, wanted[::-1], IMAGE, capacity=3, **options)
    assert_same(alone, together)
    assert_same(alone, reversed_)


def test_a_row_that_asks_nothing_reads_no_answer(host_kernels):
    """Not even a stale one: a broken lane's NaN must not reach the next image in its place."""
    silent = random_program(1, 2, 0, learned=True)
    silent.evaluates[:] = False
    silent.weights[:] = [0.9, 0.0, 0.0, 0.5]
    silent.log_sigma_max[:] = silent.log_sigma_min
    broken = random_program(1, 2, 1, learned=True, always_asks=True)
    driver = SimulatedDriver(host_kernels)

    def network(sample, timestep, label):
        return np.full((len(sample), 2 * IMAGE[0], *IMAGE[1:]), np.nan, np.float32)

    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, network, IMAGE, prediction_channels=4)
        with CudaLanes(device, backend, 1) as lanes:
            wanted = [
                {"program": program, "seed": 0, "index": 0, "tag": tag}
                for tag, program in (("clean", silent), ("broken", broken), ("after", silent))
            ]
            done = run(lanes, wanted)
            assert done["broken"].failed_row == 0
            assert done["after"].failed_row is None
            assert same_bits(done["after"].image, done["clean"].image)


def test_buckets_pad_the_network_and_change_no_image(host_kernels):
    wanted = list(requests(REAL.values(), count=7, classes=4, guided=True))
    host, cuda, _ = both(
        host_kernels,
        wanted,
        IMAGE,
        capacity=4,
        rows=2,
        num_classes=4,
        buckets=(1, 2, 4, 8),
        graph_level="L1",
    )
    assert_same(host, cuda)


@pytest.mark.parametrize(
    ("buckets", "expected"), [(None, [4, 4, 8]), ((1, 2, 8), [1, 2, 8]), ((16,), [16, 16, 16])]
)
def test_the_smallest_bucket_that_holds_the_lanes_is_evaluated(host_kernels, buckets, expected):
    driver = SimulatedDriver(host_kernels)
    program = random_program(1, 1, 0, always_asks=True)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(4), IMAGE, num_classes=4)
        with CudaLanes(device, backend, 4, graph_level="L0", buckets=buckets) as lanes:
            for lanes_started, scale in ((1, 1.0), (1, 2.0), (3, 2.0)):
                for i in range(lanes_started):
                    lanes.start(program, seed=0, index=i, label=1, guidance_scale=scale)
                lanes.advance()
            assert backend.enqueued == expected
            assert sorted(backend.prepared) == sorted(set(expected))


def test_rows_that_ask_nothing_leave_the_network_out(host_kernels):
    program = random_program(1, 10, 3)
    asked = int(program.table.evaluates.sum())
    assert 0 < asked < len(program)
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), IMAGE)
        with CudaLanes(device, backend, 2, graph_level="L0") as lanes:
            run(lanes, requests([program], count=1), rows=10)
    assert len(backend.enqueued) == asked


@pytest.mark.parametrize("image", [IMAGE, ODD_IMAGE], ids=["vector", "scalar"])
def test_pixels_made_on_the_device_are_those_of_to_uint8(host_kernels, image):
    halves = (np.arange(-3, 260) + 0.5) / 127.5 - 1  # between two levels: rounds half to even
    values = np.resize(
        np.concatenate([halves, [np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0]]), (8, *image)
    )
    program = random_program(1, 1, 0)
    program.weights[:] = [1, 0, 0, 0]
    wanted = [
        {"program": program, "seed": 0, "index": i, "tag": i, "initial": value.astype("f4")}
        for i, value in enumerate(values)
    ]
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), image)
        with CudaLanes(device, backend, 4) as lanes:
            done = run(lanes, wanted, pixels=True)
        for i, value in enumerate(values):
            assert (done[i].pixels == to_uint8(value.astype("f4"))).all()
            assert done[i].pixels.flags.c_contiguous


def test_previews_are_those_of_the_host_at_every_row(host_kernels):
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), IMAGE)
        host = HostLanes(FunctionBackend(smooth_network(), IMAGE), 3)
        with CudaLanes(device, backend, 3) as cuda:
            for request in requests(REAL.values(), count=3):
                start(host, request)
                start(cuda, request)
            while host.active:
                expected, found = host.images(), cuda.images()
                assert expected.keys() == found.keys()
                assert all(same_bits(found[tag], expected[tag]) for tag in expected)
                finished = host.advance(), cuda.advance()
                assert [one.tag for one in finished[0]] == [one.tag for one in finished[1]]
            assert (cuda.images(), cuda.advance(), cuda.active, cuda.free) == ({}, [], 0, 3)


def test_cancelled_lanes_are_free_and_the_others_go_on(host_kernels):
    wanted = list(requests(REAL.values(), count=6))
    host, _, _ = both(host_kernels, wanted, IMAGE, capacity=6)
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(), IMAGE)
        with CudaLanes(device, backend, 4, buckets=(1, 2, 4)) as lanes:
            for request in wanted[:4]:
                start(lanes, request)
            lanes.advance(rows=2)
            assert lanes.cancel(lambda tag: tag in (0, 2)) == 2
            assert (lanes.active, lanes.free) == (2, 2)
            lanes.advance()  # in a smaller bucket: the network's rows are dealt out anew
            done = run(lanes, wanted[4:], rows=3)
            assert done.keys() == {1, 3, 4, 5}
            assert_same({tag: host[tag] for tag in done}, done)
            start(lanes, wanted[0])
            assert lanes.cancel() == 1
            assert lanes.active == 0


def test_images_stay_readable_while_the_next_batches_run_and_after_close(host_kernels):
    wanted = list(requests(REAL.values(), count=20))
    host, cuda, _ = both(host_kernels, wanted, IMAGE, capacity=2, rows=50)
    assert_same(host, cuda)  # read only now, after close(): four trays' worth passed through two


@pytest.mark.parametrize("seed", range(24))
def test_any_sequence_of_calls_leaves_both_executors_in_the_same_state(host_kernels, seed):
    rng = np.random.default_rng(seed)
    image = (IMAGE, ODD_IMAGE)[seed % 2]
    capacity = int(rng.integers(1, 6))
    buckets = (None, tuple(range(1, 2 * capacity + 1)), (1, 2 * capacity + 3))[seed % 3]
    programs = [random_program(int(k), int(rng.integers(1, 9)), seed + k) for k in (1, 2, 3, 4)]
    driver = SimulatedDriver(host_kernels)
    host = HostLanes(FunctionBackend(smooth_network(3), image, num_classes=3), capacity)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(driver, smooth_network(3), image, num_classes=3)
        level = ("auto", "L0", "L1", "L2")[seed % 4]
        with CudaLanes(device, backend, capacity, graph_level=level, buckets=buckets) as cuda:
            for tag in range(40):
                match rng.integers(5):
                    case 0 | 1 if host.free:
                        request = random_request(rng, programs, image, tag)
                        start(host, request)
                        start(cuda, request)
                    case 2:
                        unwanted = set(rng.integers(tag + 1, size=2).tolist())
                        assert host.cancel(unwanted.__contains__) == cuda.cancel(
                            unwanted.__contains__
                        )
                    case 3:
                        expected, found = host.images(), cuda.images()
                        assert expected.keys() == found.keys()
                        assert all(same_bits(found[one], expected[one]) for one in expected)
                    case _:
                        rows = int(rng.integers(1, 6))
                        expected = [one for _ in range(rows) for one in host.advance()]
                        found = cuda.advance(rows)
                        assert_same(
                            {one.tag: one for one in expected}, {one.tag: one for one in found}
                        )
                assert (host.active, host.free) == (cuda.active, cuda.free)
            driver.check_memory()


def random_request(rng, programs, image, tag):
    draw = lambda: rng.normal(size=image).astype(np.float32)  # noqa: E731
    return {
        "program": programs[rng.integers(len(programs))],
        "seed": int(rng.integers(2**63)),
        "index": int(rng.integers(2**63)),
        "label": int(rng.integers(4)),
        "guidance_scale": float(rng.choice([1.0, 0.0, 3.5])),
        "initial": draw() if rng.random() < 0.2 else None,
        "known": Known(image=draw(), mask=rng.uniform(size=image).astype(np.float32))
        if rng.random() < 0.3
        else None,
        "tag": tag,
    }
