"""Both device backends under the real CudaLanes, on a simulated device: they fit together."""

from __future__ import annotations

import pytest
from plan_worlds import small_bundle

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from simulated_library import (
    SimulatedDriver,
    host_kernels,
    simulated_ort_cuda,
    simulated_tensorrt,
)

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.errors import OutOfDeviceMemoryError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.samplers import build_program

BUNDLE = small_bundle()
BUCKETS = (1, 2, 3, 4, 6)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_kernels(tmp_path_factory.mktemp("kernels"))


def sample(lanes, count=5):
    """Images of more requests than lanes, some guided; by index."""
    program = build_program(
        "ddim", schedule=BUNDLE.schedule, prediction_type="epsilon", num_inference_steps=5
    )
    waiting, done = list(range(count)), {}
    while waiting or lanes.active:
        while waiting and lanes.free:
            index = waiting.pop(0)
            scale = 2.0 if index == 1 else 1.0
            lanes.start(
                program, seed=3, index=index, label=index % 3, guidance_scale=scale, tag=index
            )
        done.update({lane.tag: lane.image for lane in lanes.advance()})
    return done


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
@pytest.mark.parametrize("version", ["10.13", "11.4", "rtx"])
def test_tensorrt_samples_the_hosts_images_at_every_graph_level(kernels, tmp_path, version, level):
    expected = sample(HostLanes(open_ort(BUNDLE, threads=1), 3))
    driver = SimulatedDriver(kernels, sm=89)
    with open_device(driver=driver.started()) as device:
        backend = simulated_tensorrt(version, BUNDLE, device, driver, tmp_path, BUCKETS)
        with CudaLanes(device, backend, 3, graph_level=level) as lanes:
            found = sample(lanes)
            assert level in lanes.description
        backend.close()
        driver.check_memory()
    assert found.keys() == expected.keys()
    assert all(found[i].tobytes() == expected[i].tobytes() for i in found)


def test_onnxruntime_samples_the_hosts_images_beside_our_kernels(kernels, monkeypatch):
    expected = sample(HostLanes(open_ort(BUNDLE, threads=1), 3))
    driver = SimulatedDriver(kernels, sm=90)
    with open_device(driver=driver.started()) as device:
        backend = simulated_ort_cuda(BUNDLE, device, driver, monkeypatch)
        with CudaLanes(device, backend, 3) as lanes:
            found = sample(lanes)
            assert "L0" in lanes.description  # it cannot be captured in a caller's graph
        driver.check_memory()
    assert all(found[i].tobytes() == expected[i].tobytes() for i in expected)


def test_a_workspace_that_does_not_fit_leaves_nothing_allocated(kernels, tmp_path):
    driver = SimulatedDriver(kernels, sm=89)
    with open_device(driver=driver.started()) as device:
        backend = simulated_tensorrt("11.4", BUNDLE, device, driver, tmp_path, BUCKETS)
        with CudaLanes(device, backend, 3):
            needed = sum(size for _, size, kind in driver.memory.values() if kind == "device")
        driver.memory_bytes = needed - 5000  # the workspace takes 6000
        with pytest.raises(OutOfDeviceMemoryError):
            CudaLanes(device, backend, 3)
        assert not driver.memory
