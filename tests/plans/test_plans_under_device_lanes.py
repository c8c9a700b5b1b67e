"""Both device backends under the real CudaLanes, on a simulated device: they fit together.

The driver is tests/cuda's simulator, which queues work as a stream would; the inference library is
a fake that runs the real network in ONNX Runtime on the CPU when its turn on the stream comes.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from fake_tensorrt import FakeTensorRT
from plan_worlds import small_bundle

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.backends.ort_cuda import open_ort_cuda
from ddpm_runtime.backends.tensorrt import open_tensorrt
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.cuda.errors import OutOfDeviceMemoryError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.plans import PlanCache, library_of
from ddpm_runtime.samplers import build_program

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
sys.path.append(str(Path(__file__).parent.parent / "cuda"))
from helpers_cuda.host_build import EXACT, HostKernels, build
from helpers_cuda.simulator import SimulatedDriver

BUNDLE = small_bundle()
SHAPES = {"sample": (1, 8, 8), "timestep": (), "label": (), "prediction": (1, 8, 8)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return HostKernels(build(tmp_path_factory.mktemp("kernels") / "exact", EXACT))


def on_stream(driver):
    """What a library does with bound addresses: the network, when the stream gets there."""
    session = onnxruntime.InferenceSession(BUNDLE.network_bytes, providers=["CPUExecutionProvider"])

    def at(address, name, rows):
        kind = np.dtype(np.int64 if name == "label" else np.float32)
        shape = (rows, *SHAPES[name])
        size = int(np.prod(shape)) * kind.itemsize
        return np.ndarray(shape, kind, buffer=(ctypes.c_uint8 * size).from_address(address))

    def execute(addresses, rows, stream):
        def work():
            inputs = {n: at(a, n, rows) for n, a in addresses.items() if n != "prediction"}
            answer = session.run(["prediction"], inputs)[0]
            at(addresses["prediction"], "prediction", rows)[...] = answer

        driver.host_function(stream, work)

    return execute


def tensorrt_backend(version, device, driver, tmp_path):
    fake = FakeTensorRT(version, buckets=(1, 2, 3, 4, 6))
    fake.execute = on_stream(driver)
    cache = PlanCache(tmp_path / "plans")
    return open_tensorrt(
        BUNDLE, device, library=library_of(fake), cache=cache, buckets=fake.buckets
    )


class OptionsThatAllowTheCpu(onnxruntime.SessionOptions):
    """The one option that the stand-in, which does run on the CPU, cannot take."""

    def add_session_config_entry(self, key, value):
        assert (key, value) == ("session.disable_cpu_ep_fallback", "1")


def ort_backend(device, driver, monkeypatch):
    execute = on_stream(driver)

    def session(content, options, *, providers, enable_fallback):
        stream = int(providers[0][1]["user_compute_stream"])
        real = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        bound = {}

        def bind(name, kind, ordinal, element, shape, address):
            bound[name] = (address, shape[0])

        def run(io_binding, run_options=None):
            rows = {rows for _, rows in bound.values()}
            execute({name: address for name, (address, _) in bound.items()}, rows.pop(), stream)
            if run_options is None:
                driver._call("cuStreamSynchronize", stream)

        return SimpleNamespace(
            disable_fallback=lambda: None,
            get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            get_inputs=real.get_inputs,
            get_outputs=real.get_outputs,
            io_binding=lambda: SimpleNamespace(bind_input=bind, bind_output=bind),
            run_with_iobinding=run,
        )

    fake = SimpleNamespace(
        __version__="1.31.1",
        get_available_providers=lambda: ["CUDAExecutionProvider"],
        set_default_logger_severity=lambda level: None,
        SessionOptions=OptionsThatAllowTheCpu,
        RunOptions=onnxruntime.RunOptions,
        GraphOptimizationLevel=onnxruntime.GraphOptimizationLevel,
        InferenceSession=session,
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    backend = open_ort_cuda(BUNDLE, device)
    monkeypatch.undo()
    return backend


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
        backend = tensorrt_backend(version, device, driver, tmp_path)
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
        backend = ort_backend(device, driver, monkeypatch)
        with CudaLanes(device, backend, 3) as lanes:
            found = sample(lanes)
            assert "L0" in lanes.description  # it cannot be captured in a caller's graph
        driver.check_memory()
    assert all(found[i].tobytes() == expected[i].tobytes() for i in expected)


def test_a_workspace_that_does_not_fit_leaves_nothing_allocated(kernels, tmp_path):
    driver = SimulatedDriver(kernels, sm=89)
    with open_device(driver=driver.started()) as device:
        backend = tensorrt_backend("11.4", device, driver, tmp_path)
        with CudaLanes(device, backend, 3):
            needed = sum(size for _, size, kind in driver.memory.values() if kind == "device")
        driver.memory_bytes = needed - 5000  # the workspace takes 6000
        with pytest.raises(OutOfDeviceMemoryError):
            CudaLanes(device, backend, 3)
        assert not driver.memory
