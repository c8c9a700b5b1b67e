"""Engine(device="cuda") from end to end, on a simulated device and simulated libraries."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from fake_tensorrt import FakeTensorRT
from simulated_library import SimulatedDriver, host_kernels, on_stream, simulated_ort_cuda

from ddpm_runtime import Engine
from ddpm_runtime.backends.base import NetworkShape
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.cuda import open_device
from ddpm_runtime.errors import BackendUnavailableError, NonFiniteError, OutOfDeviceMemoryError
from ddpm_runtime.plans import library_of

SETTINGS = {"seed": 3, "steps": 6, "label": "all", "guidance_scale": 2.0, "output": "float32"}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def driver(kernels, monkeypatch):
    """The only GPU of this machine."""
    driver = SimulatedDriver(kernels, sm=89)
    monkeypatch.setattr(
        "ddpm_runtime.cuda.runner.open_device",
        lambda ordinal: open_device(ordinal, driver=driver.started()),
    )
    monkeypatch.setenv("DDPM_DEVICE", "")
    return driver


@pytest.fixture
def tensorrt(driver, tiny_engine_path, monkeypatch, tmp_path):
    """TensorRT is installed; plans of any size."""
    bundle = read_bundle(tiny_engine_path)
    shape = NetworkShape.from_bundle(bundle)
    tensors = {
        "sample": (-1, *shape.image),
        "timestep": (-1,),
        "label": (-1,),
        "prediction": (-1, *shape.image),
    }
    fake = FakeTensorRT("11.4", buckets=(1, 2, 4, 8, 16), tensors=tensors)
    fake.execute = on_stream(driver, bundle)
    monkeypatch.setenv("DDPM_PLAN_CACHE", str(tmp_path / "plans"))
    monkeypatch.setattr("ddpm_runtime.plans.load_library", lambda name: library_of(fake))
    monkeypatch.setattr(
        "ddpm_runtime.backends.tensorrt.buckets_for", lambda rows: fake.buckets
    )  # the fake has one plan
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: name == "tensorrt")
    return fake


@pytest.fixture
def expected(tiny_engine_path):
    with Engine.load(tiny_engine_path, device="cpu") as engine:
        return engine.sample(7, **SETTINGS)


def bits(images):
    return images.tobytes()


@pytest.mark.parametrize("choices", [
    {"device": "cuda"},
    {"device": "cuda", "graph_level": "L0"},
    {"device": "cuda", "graph_level": "L1", "lanes": 4},
    {"device": "auto"},
    {"backend": "tensorrt"},
])  # fmt: skip
def test_the_images_of_the_host_come_out(driver, tensorrt, tiny_engine_path, expected, choices):
    if "lanes" in choices:
        tensorrt.buckets = (2 * choices["lanes"],)  # one batch size is all that is built
    with Engine.load(tiny_engine_path, **choices) as engine:
        assert "TensorRT" in engine.description
        assert bits(engine.sample(7, **SETTINGS)) == bits(expected)
        assert bits(engine.sample(7, **SETTINGS, batch_size=2)) == bits(expected)
        pixels = engine.sample(7, **{**SETTINGS, "output": "uint8"})
        driver.check_memory()
    with Engine.load(tiny_engine_path, device="cpu") as host:
        assert bits(pixels) == bits(host.sample(7, **{**SETTINGS, "output": "uint8"}))
    assert not driver.memory
    assert driver.retained == 0


def test_onnxruntime_is_taken_where_there_is_no_tensorrt(
    driver, tiny_engine_path, expected, monkeypatch
):
    bundle = read_bundle(tiny_engine_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    monkeypatch.setattr(
        "ddpm_runtime.backends.ort_cuda.open_ort_cuda",
        lambda _bundle, device: simulated_ort_cuda(bundle, device, driver, monkeypatch),
    )
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        assert "tensorrt is not installed; tensorrt_rtx is not installed" in engine.description
        assert bits(engine.sample(7, **SETTINGS)) == bits(expected)
    assert not driver.memory


def test_a_device_is_closed_when_no_library_can_use_it(driver, tiny_engine_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(BackendUnavailableError, match=r"tensorrt is not installed.*without CUDA"):
        Engine.load(tiny_engine_path, device="cuda")
    assert not driver.memory
    assert driver.retained == 0


def test_rtx_on_a_gpu_it_does_not_support_says_what_else_there_is(
    kernels, driver, tiny_engine_path, monkeypatch
):
    driver.sm = 90
    fake = FakeTensorRT("rtx")
    monkeypatch.setattr("ddpm_runtime.plans.load_library", lambda name: library_of(fake))
    with pytest.raises(BackendUnavailableError, match=r"supports .*8\.9.* has 9\.0.*'onnxruntime'"):
        Engine.load(tiny_engine_path, device="cuda", backend="tensorrt_rtx")


def test_progress_looks_a_few_times_and_without_it_the_host_waits_twice_a_batch(
    driver, tensorrt, tiny_engine_path
):
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        events = []
        watched = {"steps": 100, "sampler": "ddim", "seed": 3}
        images = engine.sample(2, **watched, on_step=events.append)
        assert len(events) == 34  # 100 rows, three at a time
        assert events[-1].rows_done == events[-1].rows_total == 200
        engine.sample(2, **watched)
        before = len(driver.log)
        again = engine.sample(2, **watched)
        waits = [call for call in driver.log[before:] if "Synchronize" in call]
    assert len(waits) == 2  # for the last of a hundred rows, and for the images
    assert bits(images) == bits(again)


def test_previews_show_every_image_in_flight(driver, tensorrt, tiny_engine_path):
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        seen = []
        images = engine.sample(3, steps=4, on_step=lambda event: seen.append(event.previews()))
    assert [set(previews) for previews in seen] == [{0, 1, 2}] * 4
    assert all((seen[-1][i] == images[i]).all() for i in range(3))


def test_encoding_and_inpainting_are_the_hosts(driver, tensorrt, tiny_engine_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 8, 8, 1), np.uint8)
    mask = (rng.random((8, 8)) < 0.5).astype(np.float32)
    given = {"image": image[0], "mask": mask, "sampler": "repaint", "steps": 5, "output": "float32"}
    results = []
    for device in ("cpu", "cuda"):
        with Engine.load(tiny_engine_path, device=device) as engine:
            results.append(bits(engine.encode(image, steps=5)) + bits(engine.sample(3, **given)))
    assert results[0] == results[1]


def test_memory_that_is_out_halves_the_lanes_and_changes_no_image(
    driver, tensorrt, tiny_engine_path, expected
):
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        engine.sample(4, **SETTINGS)
        needed = sum(size for _, size, kind in driver.memory.values() if kind == "device")
    driver.memory_bytes = needed + 100
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        assert bits(engine.sample(7, **SETTINGS)) == bits(expected)
    driver.memory_bytes = 1000
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        with pytest.raises(OutOfDeviceMemoryError, match="neither 8 nor 4 images"):
            engine.sample(7, **SETTINGS)
        driver.memory_bytes = 1 << 30
        assert bits(engine.sample(7, **SETTINGS)) == bits(expected)
    tensorrt.buckets = (16,)
    with Engine.load(tiny_engine_path, device="cuda", lanes=8) as engine:
        driver.memory_bytes = 1000
        with pytest.raises(OutOfDeviceMemoryError):
            engine.sample(7, **SETTINGS)  # fewer lanes could have other bits: not tried


def test_an_image_that_breaks_is_an_error_that_names_it(driver, tensorrt, tiny_engine_path):
    x_T = np.zeros((3, 1, 8, 8), np.float32)
    x_T[1] = 3e38  # overflows in the network
    with Engine.load(tiny_engine_path, device="cuda") as engine:
        stream = engine.stream(3, x_T=x_T, steps=5, clip_denoised=False, output="float32")
        words = ""
        with pytest.raises(NonFiniteError) as caught:
            for _ in stream:
                pass
        words = str(caught.value)
        assert re.match(r"image 1 holds NaN or infinity after row \d of 5", words)
        assert np.isfinite(engine.sample(3, steps=5, output="float32")).all()


def test_threads_have_lanes_of_their_own(driver, tensorrt, tiny_engine_path, expected):
    found, lock = [], threading.Lock()
    with Engine.load(tiny_engine_path, device="cuda") as engine:

        def work():
            with lock:  # the simulated device is not for several threads at once
                found.append(bits(engine.sample(7, **SETTINGS)))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [bits(expected)] * 3
    assert not driver.memory
