"""The graph state machine and the levels over it, against a driver that records every call."""

from __future__ import annotations

import pytest
from cuda.bindings import driver as real
from helpers_cuda.networks import SimulatedBackend, smooth_network
from helpers_cuda.pairs import assert_same, both, requests, run
from helpers_cuda.programs import random_program
from helpers_cuda.simulator import BLOCKING, Code, SimulatedDriver

from ddpm_runtime.cuda import CudaLanes, GraphError, open_device
from ddpm_runtime.cuda.graph import DeviceGraph, GraphState
from ddpm_runtime.cuda.levels import UNROLLED_ROWS
from ddpm_runtime.errors import BackendError, ConfigurationError, LifecycleError

IMAGE = (1, 2, 4)
PROGRAM = random_program(1, 20, 0, always_asks=True)
UNSUPPORTED = Code.CUDA_ERROR_NOT_SUPPORTED


@pytest.fixture
def driver(host_kernels):
    return SimulatedDriver(host_kernels)


@pytest.fixture
def device(driver):
    with open_device(driver=driver.started()) as opened:
        yield opened


def lanes_over(driver, device, capacity=2, **options):
    backend = SimulatedBackend(driver, smooth_network(), IMAGE)
    return backend, CudaLanes(device, backend, capacity, **options)


def chunk(driver, lanes, rows):
    """The calls of one chunk, between bringing the lanes up to date and settling."""
    start = len(driver.log)
    lanes.advance(rows)
    calls = driver.log[start:]
    first = max(i for i, c in enumerate(calls) if c == "cuCtxSetCurrent") + 1
    last = calls.index("cuMemcpyDtoHAsync")
    return calls[first:last]


# --- one graph --------------------------------------------------------------------------------


def test_a_graph_is_captured_instantiated_launched_and_closed_in_this_order(driver, device):
    stream, graph = device.stream(), DeviceGraph(device)
    driver.log.clear()
    graph.begin_capture(stream)
    driver.host_function(stream.address, lambda: ran.append(1))
    graph.end_capture()
    graph.instantiate(stream)
    ran: list[int] = []
    graph.launch(stream)
    graph.launch(stream)
    stream.synchronize()
    graph.close()
    graph.close()
    assert ran == [1, 1]  # captured work does not run until it is launched
    assert driver.log == [
        *("cuStreamBeginCapture", "network", "cuStreamEndCapture"),
        *("cuGraphInstantiate", "cuGraphUpload", "cuGraphLaunch", "cuGraphLaunch"),
        *("cuStreamSynchronize", "cuGraphExecDestroy", "cuGraphDestroy"),
    ]


def test_a_loop_graph_is_one_while_node_whose_body_is_captured(driver, device):
    stream, graph = device.stream(), DeviceGraph(device, loop=True)
    driver.log.clear()
    graph.begin_capture(stream)
    assert graph.condition == 1
    graph.end_capture()
    graph.instantiate(stream)
    graph.close()
    assert driver.log == [
        *("cuGraphCreate", "cuGraphConditionalHandleCreate", "cuGraphAddNode"),
        *("cuStreamBeginCaptureToGraph", "cuStreamEndCapture"),
        *("cuGraphInstantiate", "cuGraphUpload", "cuGraphExecDestroy", "cuGraphDestroy"),
    ]


def test_every_call_out_of_order_says_which_comes_first(device):
    stream = device.stream()
    graph = DeviceGraph(device)
    steps = [
        ("begin_capture", lambda: graph.begin_capture(stream)),
        ("end_capture", graph.end_capture),
        ("instantiate", lambda: graph.instantiate(stream)),
        ("launch", lambda: graph.launch(stream)),
    ]
    for reached, (expected, _) in enumerate(steps):
        for position, (_, call) in enumerate(steps):
            if position != reached:
                with pytest.raises(LifecycleError, match=rf"{expected}\(\) comes first"):
                    call()
        steps[reached][1]()
    graph.close()
    for _, call in steps:
        with pytest.raises(LifecycleError, match="a new graph comes first"):
            call()


def test_only_a_loop_graph_has_a_condition_and_only_while_capturing(device):
    stream = device.stream()
    with pytest.raises(LifecycleError, match=r"begin_capture\(\) comes first"):
        _ = DeviceGraph(device, loop=True).condition
    plain = DeviceGraph(device)
    plain.begin_capture(stream)
    with pytest.raises(LifecycleError, match="loop=True"):
        _ = plain.condition
    plain.close()


@pytest.mark.parametrize("loop", [False, True])
def test_closing_during_a_capture_frees_the_stream(driver, device, loop):
    stream, graph = device.stream(), DeviceGraph(device, loop=loop)
    graph.begin_capture(stream)
    graph.close()
    assert graph.state is GraphState.CLOSED
    again = DeviceGraph(device)
    again.begin_capture(stream)  # would fail on a stream that is still capturing
    again.close()
    assert driver.log.count("cuGraphDestroy") == 2


@pytest.mark.parametrize(
    "function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"]
)
def test_a_failure_leaves_nothing_behind(driver, device, function):
    stream, graph = device.stream(), DeviceGraph(device)
    kept = set(driver.handles)
    driver.fail(function, UNSUPPORTED)
    with pytest.raises(GraphError, match=f"{function} answered CUDA_ERROR_NOT_SUPPORTED"):
        graph.begin_capture(stream)
        graph.end_capture()
        graph.instantiate(stream)
    graph.close()
    assert driver.handles.keys() == kept
    assert not driver.handles[stream.address].captures_into


# --- the levels -------------------------------------------------------------------------------

ROW = ["cuLaunchKernel advance", "network", "cuLaunchKernel update"]


def test_level_0_launches_every_kernel_of_every_row(driver, device):
    _, lanes = lanes_over(driver, device, graph_level="L0")
    lanes.start(PROGRAM, seed=0, index=0)
    lanes.advance(1)
    assert chunk(driver, lanes, 3) == ROW * 3


def test_level_1_launches_one_graph_a_row(driver, device):
    _, lanes = lanes_over(driver, device, graph_level="L1")
    lanes.start(PROGRAM, seed=0, index=0)
    captured = chunk(driver, lanes, 1)
    assert captured == [
        *("cuMemcpyHtoDAsync",) * 3,
        "cuLaunchKernel start",
        *("network", "cuStreamSynchronize"),  # prepare
        *("cuStreamBeginCapture", *ROW, "cuStreamEndCapture"),
        *("cuGraphInstantiate", "cuGraphUpload", "cuGraphLaunch"),
    ]
    assert chunk(driver, lanes, 5) == ["cuGraphLaunch"] * 5


def test_level_2_launches_one_graph_a_chunk(driver, device):
    _, lanes = lanes_over(driver, device, graph_level="L2")
    lanes.start(PROGRAM, seed=0, index=0)
    captured = chunk(driver, lanes, 2)
    assert captured[4:] == [
        *("network", "cuStreamSynchronize"),  # prepare
        *("cuModuleLoadData", "cuModuleGetFunction"),
        *("cuGraphCreate", "cuGraphConditionalHandleCreate", "cuGraphAddNode"),
        "cuStreamBeginCaptureToGraph",
        *("cuLaunchKernel advance_loop", "network", "cuLaunchKernel update"),
        *("cuStreamEndCapture", "cuGraphInstantiate", "cuGraphUpload"),
        *("cuMemsetD32Async", "cuGraphLaunch"),
    ]
    before = len(driver.launches)
    assert chunk(driver, lanes, 9) == ["cuMemsetD32Async", "cuGraphLaunch"]
    assert driver.launches[before:] == ["advance_loop", "update"] * 9


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_no_chunk_waits_for_the_device_before_its_end(driver, device, level):
    _, lanes = lanes_over(driver, device, graph_level=level)
    lanes.warm_up()
    lanes.start(PROGRAM, seed=0, index=0)
    start = len(driver.log)
    lanes.advance(19)
    calls = driver.log[start:]
    assert [call for call in calls if call in BLOCKING] == ["cuEventSynchronize"]
    assert calls[-1] == "cuEventSynchronize"
    assert not [call for call in calls if call in ("cuMemAlloc", "cuMemFree", "cuMemAllocHost")]


def test_another_bucket_gets_a_graph_of_its_own_and_the_old_one_stays(driver, device):
    backend, lanes = lanes_over(driver, device, capacity=4, graph_level="L1", buckets=(1, 4))
    for started in (1, 2):
        for i in range(started):
            lanes.start(PROGRAM, seed=0, index=i)
        lanes.advance()
    assert driver.log.count("cuStreamBeginCapture") == 2
    lanes.cancel()
    lanes.start(PROGRAM, seed=0, index=0)
    assert chunk(driver, lanes, 2)[-2:] == ["cuGraphLaunch"] * 2
    assert driver.log.count("cuStreamBeginCapture") == 2
    assert backend.prepared == backend.enqueued == [1, 4]


FAILING = {
    "cuModuleLoadData": "L2, one graph for 8 rows",
    "cuGraphConditionalHandleCreate": "L2, one graph for 8 rows",
    "cuGraphAddNode": "L2, one graph for 8 rows",
    "cuStreamBeginCaptureToGraph": "L2, one graph for 8 rows",
}


@pytest.mark.parametrize(("function", "level"), FAILING.items())
def test_automatic_levels_step_down_where_the_driver_cannot_and_say_so(
    host_kernels, function, level, caplog
):
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        _, lanes = lanes_over(driver, device, graph_level="auto")
        driver.fail(function, UNSUPPORTED, times=2)  # shipped code, then code compiled here
        run(lanes, requests([PROGRAM], count=3), rows=20)
        assert lanes.description.startswith(level)
        assert f"{function} answered CUDA_ERROR_NOT_SUPPORTED" in lanes.description
        assert function in caplog.text
        assert driver.launches.count("update") == 40  # two lanes, then the third: 20 rows each
        lanes.close()


@pytest.mark.parametrize("how_many", [1, 2, 3])
def test_a_network_that_cannot_be_captured_ends_at_plain_launches_with_the_same_images(
    host_kernels, how_many
):
    wanted = list(requests([PROGRAM], count=4))
    host, _, _ = both(host_kernels, wanted, IMAGE, capacity=3)
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend, lanes = lanes_over(driver, device, capacity=3, graph_level="auto")
        backend.synchronises = True  # not allowed in a capture, fine outside one
        cuda = run(lanes, wanted, rows=how_many * UNROLLED_ROWS + 1)
        assert_same(host, cuda)
        assert lanes.description.startswith("L0, plain launches (not L2, one graph with a cond")
        assert lanes.description.count("STREAM_CAPTURE") >= 3
        lanes.close()


def test_rows_unrolled_in_one_graph_do_what_is_left_one_by_one(host_kernels):
    driver = SimulatedDriver(host_kernels)
    driver.fail("cuGraphAddNode", UNSUPPORTED)
    with open_device(driver=driver.started()) as device:
        _, lanes = lanes_over(driver, device, graph_level="L2")
        lanes.start(PROGRAM, seed=0, index=0)
        lanes.advance(1)
        before = len(driver.launches)
        assert chunk(driver, lanes, 2 * UNROLLED_ROWS + 2) == ["cuGraphLaunch"] * 4
        assert driver.launches[before:] == ["advance", "update"] * (2 * UNROLLED_ROWS + 2)
        lanes.close()


@pytest.mark.parametrize("level", ["L1", "L2"])
def test_an_asked_level_never_falls_back(host_kernels, level):
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend, lanes = lanes_over(driver, device, graph_level=level)
        backend.synchronises = True
        lanes.start(PROGRAM, seed=0, index=0)
        with pytest.raises(GraphError, match=f"graph level {level} was asked and cannot be had"):
            lanes.advance()
        lanes.close()


@pytest.mark.parametrize("known_when", ["bound", "prepared"])
def test_a_network_that_is_not_capture_safe_runs_at_plain_launches(host_kernels, known_when):
    driver = SimulatedDriver(host_kernels)
    with open_device(driver=driver.started()) as device:
        backend = SimulatedBackend(
            driver, smooth_network(), IMAGE, capture_safe=known_when == "prepared"
        )
        backend.safe_once_prepared = False
        with CudaLanes(device, backend, 2) as lanes:
            run(lanes, requests([PROGRAM], count=1), rows=20)
            assert "L0, plain launches (the network cannot be captured into" in lanes.description
            assert "cuStreamBeginCapture" not in driver.log
        for level in ("L1", "L2"):
            backend.prepared.clear()
            with (
                pytest.raises(ConfigurationError, match="use level auto or L0"),
                CudaLanes(device, backend, 2, graph_level=level) as lanes,
            ):
                lanes.warm_up()
            assert not backend.bindings


def test_an_unknown_level_is_refused_with_the_choices(driver, device):
    with pytest.raises(ConfigurationError, match="possible: L0, L1, L2, auto"):
        lanes_over(driver, device, graph_level="L3")


def test_a_graph_that_runs_too_few_rows_is_noticed(driver, device):
    _, lanes = lanes_over(driver, device, graph_level="L1")
    lanes.start(PROGRAM, seed=0, index=0)
    lanes.advance(1)
    driver._cuGraphLaunch = lambda executable, stream: None
    with pytest.raises(BackendError, match="lane 0 is at row 1 where 3 was asked"):
        lanes.advance(2)


def test_the_real_structure_of_a_conditional_node_takes_what_we_write():
    """The simulator has a stand-in for it; this is the binding's own."""
    node = real.CUgraphNodeParams()
    node.type = real.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    node.conditional.handle = real.CUgraphConditionalHandle(7)
    node.conditional.type = real.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    node.conditional.size = 1
    node.conditional.ctx = real.CUcontext(0xC0)
    assert int(node.conditional.handle) == 7
    assert int(node.conditional.ctx) == 0xC0
    assert node.conditional.size == 1
    assert hasattr(node.conditional, "phGraph_out")
    assert real.CU_GRAPH_COND_ASSIGN_DEFAULT == 1
