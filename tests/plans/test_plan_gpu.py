"""Both device backends on a real GPU, and the same tests rehearsed on the simulated one.

Run on a machine with a GPU: ``python -m pytest tests/plans -m gpu``. Each library that is missing
there is skipped by name. The rehearsal shows that the tests themselves work.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from plan_worlds import small_bundle

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from simulated_library import (
    SimulatedDriver,
    host_kernels,
    simulated_ort_cuda,
    simulated_tensorrt,
)

from ddpm_runtime.backends.base import Backend
from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.backends.ort_cuda import open_ort_cuda
from ddpm_runtime.backends.tensorrt import open_tensorrt
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.errors import BackendUnavailableError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.plans import PlanCache, load_library
from ddpm_runtime.samplers import build_program

CAPACITY = 4
TOLERANCES = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 1e-1}  # of a final value in [−1, 1]

GPU_CASES = [
    pytest.param((library, precision), id=f"{library}-{precision}", marks=pytest.mark.gpu)
    for library in ("tensorrt", "tensorrt_rtx", "onnxruntime")
    for precision in ("fp32", "fp16", "bf16")
]
REHEARSALS = [pytest.param((f"simulated {kind}", "fp32"), id=f"rehearsal-{kind}")
              for kind in ("11.4", "rtx", "onnxruntime")]  # fmt: skip


@dataclasses.dataclass
class Stage:
    """A device, a bundle, and the network loaded on the device."""

    device: Any
    bundle: Bundle
    backend: Any
    host: Backend
    precision: str
    conditions: bool


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=[*GPU_CASES, *REHEARSALS])
def stage(request, tmp_path, monkeypatch, shipped_engine_path):
    library, precision = request.param
    if library.startswith("simulated "):
        bundle, kind = small_bundle(), library.removeprefix("simulated ")
        kernels = request.getfixturevalue("kernels")
        driver = SimulatedDriver(kernels, sm=89)
        with open_device(driver=driver.started()) as device:
            if kind == "onnxruntime":
                backend = simulated_ort_cuda(bundle, device, driver, monkeypatch)
            else:
                sizes = (CAPACITY, 2 * CAPACITY)
                backend = simulated_tensorrt(kind, bundle, device, driver, tmp_path, sizes)
            host = open_ort(bundle, threads=1)
            yield Stage(device, bundle, backend, host, precision, kernels.conditions)
        return
    try:
        device = open_device()
    except BackendUnavailableError as error:
        pytest.skip(f"no GPU: {error}")
    single = read_bundle(shipped_engine_path)
    with device:
        lowered = single if precision == "fp32" else lowered_once(shipped_engine_path, precision)
        backend = on_gpu(library, lowered, device, tmp_path)
        yield Stage(device, single, backend, open_ort(single), precision, True)
        backend.close()


@functools.cache  # it takes seconds
def lowered_once(path, precision):
    precision_bundle = pytest.importorskip(
        "ddpm_export.precision_bundle", reason="the export extra is not installed"
    )
    return precision_bundle.lowered_bundle(read_bundle(path), precision)[0]


def on_gpu(library, bundle, device, tmp_path):
    if library == "onnxruntime":
        if bundle.manifest.network.precision == "bf16" and device.sm < 80:
            pytest.skip("bfloat16 needs compute capability 8.0")
        try:
            return open_ort_cuda(bundle, device)
        except BackendUnavailableError as error:
            pytest.skip(str(error))
    try:
        loaded = load_library(library)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    if loaded.is_rtx and device.sm not in loaded.capabilities:
        pytest.skip(f"{loaded.title} does not support compute capability {device.sm / 10}")
    return open_tensorrt(
        bundle,
        device,
        library=loaded,
        buckets=(CAPACITY, 2 * CAPACITY),
        cache=PlanCache(tmp_path / "plans"),
        optimization_level=1,  # quick to build
    )


def sample(stage, lanes, indices, *, steps=10, guided=False, spoil=None):
    """Final images by index; lane ``spoil`` starts from NaN."""
    program = build_program(
        "ddim", schedule=stage.bundle.schedule, prediction_type="epsilon", num_inference_steps=steps
    )
    waiting, done = list(indices), {}
    while waiting or lanes.active:
        while waiting and lanes.free:
            index = waiting.pop(0)
            initial = None
            if index == spoil:
                initial = np.full(stage.backend.shape.image, np.nan, np.float32)
            lanes.start(
                program,
                seed=7,
                index=index,
                label=index % 3,
                guidance_scale=2.0 if guided else 1.0,
                initial=initial,
                tag=index,
            )
        done.update({lane.tag: lane for lane in lanes.advance()})
    return done


def levels(stage):
    """The graph levels this backend can have here."""
    probe = ["L0", "L1", "L2"] if stage.backend.name == "tensorrt" else ["L0"]
    return probe if stage.conditions else probe[:2]


@pytest.mark.parametrize("guided", [False, True])
def test_final_images_are_the_hosts_within_the_tolerance_of_the_precision(stage, guided):
    expected = sample(stage, HostLanes(stage.host, CAPACITY), range(6), guided=guided)
    for level in levels(stage):
        with CudaLanes(stage.device, stage.backend, CAPACITY, graph_level=level) as lanes:
            found = sample(stage, lanes, range(6), guided=guided)
        for index in range(6):
            difference = np.abs(found[index].image - expected[index].image).max()
            assert difference < TOLERANCES[stage.precision], f"{level}, image {index}"


def test_an_image_has_the_same_bits_in_every_company(stage):
    with CudaLanes(stage.device, stage.backend, CAPACITY, buckets=(2 * CAPACITY,)) as lanes:
        together = sample(stage, lanes, range(6))
        alone = sample(stage, lanes, [2])
        backwards = sample(stage, lanes, reversed(range(6)))
    bits = {run[2].image.tobytes() for run in (together, alone, backwards)}
    assert len(bits) == 1
    for index in range(6):
        assert together[index].image.tobytes() == backwards[index].image.tobytes()


def test_every_graph_level_gives_the_same_bits(stage):
    runs = []
    for level in levels(stage):
        with CudaLanes(stage.device, stage.backend, CAPACITY, graph_level=level) as lanes:
            runs.append(sample(stage, lanes, range(4)))
    for run in runs[1:]:
        assert all(run[i].image.tobytes() == runs[0][i].image.tobytes() for i in range(4))


def test_nan_in_one_lane_fails_that_lane_alone(stage):
    with CudaLanes(stage.device, stage.backend, CAPACITY) as lanes:
        healthy = sample(stage, lanes, range(4))
        spoilt = sample(stage, lanes, range(4), spoil=1)
    assert spoilt[1].failed_row is not None
    for index in (0, 2, 3):
        assert spoilt[index].failed_row is None
        assert spoilt[index].image.tobytes() == healthy[index].image.tobytes()
