"""What Engine promises, on a real GPU with every library it has; rehearsed on the simulated one.

Run on a machine with a GPU: ``python -m pytest tests/plans -m gpu``. A library that is missing
there is skipped by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
from simulated_machine import host_kernels, install

from ddpm_bench.gpu_timing import ChunkTimer
from ddpm_bench.stepping import program_for
from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.cuda import open_device
from ddpm_runtime.errors import (
    BackendUnavailableError,
    NonFiniteError,
    OutOfDeviceMemoryError,
)
from ddpm_runtime.runner import Opening, open_runner

LANES = 8
ONE_LEVEL = 1 / 127.5  # of 255, as images in [−1, 1] have it
WAITS = {"cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuMemcpyHtoD"}
TRAJECTORIES = {
    "ddim": {"sampler": "ddim", "steps": 20},
    "ddim guided": {"sampler": "ddim", "steps": 10, "guidance_scale": 2.0},
    "dpmpp_2m": {"sampler": "dpmpp_2m", "steps": 10},
    "ddpm": {"sampler": "ddpm", "steps": 20},
}


@dataclasses.dataclass
class Stage:
    """An engine bundle, and how to open it."""

    path: Path
    backend: str
    leave_bytes: int  # of the device's memory, when it is taken

    def engine(self, **changes: Any) -> Engine:
        return Engine.load(self.path, device="cuda", backend=self.backend, **changes)

    def runner(self, **changes: Any) -> Any:
        opening = Opening(device="cuda", backend=self.backend, **changes)
        return open_runner(read_bundle(self.path), opening)


CASES = [
    pytest.param((kind, library), id=f"{kind}-{library}", marks=marks)
    for kind, marks in (("gpu", pytest.mark.gpu), ("rehearsal", ()))
    for library in ("tensorrt", "tensorrt_rtx", "onnxruntime")
    if (kind, library) != ("rehearsal", "tensorrt_rtx")
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(params=CASES)
def stage(request, monkeypatch, tmp_path, shipped_engine_path, tiny_engine_path) -> Stage:
    kind, library = request.param
    if kind == "rehearsal":
        install(monkeypatch, request.getfixturevalue("kernels"), tmp_path)
        return Stage(tiny_engine_path, library, 1 << 18)
    found = Stage(shipped_engine_path, library, 1 << 25)
    try:
        found.runner(lanes=LANES).close()
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return found


def bits(images: np.ndarray) -> bytes:
    return images.tobytes()


def test_whole_trajectories_are_the_hosts_within_one_grey_level(stage):
    with Engine.load(stage.path, device="cpu") as host, stage.engine(lanes=LANES) as engine:
        for name, settings in TRAJECTORIES.items():
            asked = {"seed": 5, "label": "all", "output": "float32", **settings}
            expected, found = host.sample(LANES, **asked), engine.sample(LANES, **asked)
            worst = np.abs(found - expected).max()
            assert worst < ONE_LEVEL, f"{name}: {worst / ONE_LEVEL:.2f} levels apart"


@pytest.mark.parametrize("level", ["L0", "L1", "L2"])
def test_an_image_has_the_same_bits_in_every_batch(stage, level):
    if stage.backend == "onnxruntime" and level != "L0":
        pytest.skip("ONNX Runtime runs a CUDA graph of its own: L0 alone")
    asked = {"seed": 3, "steps": 8, "output": "float32", "label": 1}
    with stage.engine(lanes=LANES, graph_level=level) as engine:
        together = engine.sample(LANES + 3, **asked)
        small = engine.sample(LANES + 3, **asked, batch_size=3)
        alone = [engine.sample(1, **asked, first_index=index)[0] for index in (0, 5, LANES + 2)]
        guided = engine.sample(2, **{**asked, "guidance_scale": 2.0})
        again = engine.sample(2, **asked)
    assert bits(small) == bits(together)
    for index, image in zip((0, 5, LANES + 2), alone, strict=True):
        assert bits(image) == bits(together[index])
    assert bits(again) == bits(together[:2])
    assert bits(guided) != bits(again)


def test_every_graph_level_gives_the_same_bits(stage):
    found = []
    for level in ("auto", "L0") if stage.backend == "onnxruntime" else ("L0", "L1", "L2"):
        with stage.engine(lanes=LANES, graph_level=level) as engine:
            found.append(bits(engine.sample(3, seed=1, steps=11, output="float32")))
    assert len(set(found)) == 1


@pytest.mark.parametrize("level", ["L0", "auto"])
def test_a_chunk_never_waits_for_the_device(stage, level, monkeypatch):
    """The stream is held until the whole chunk is on it: whoever waits for it is found out."""
    rows = 2 if level == "L0" else 8
    runner = stage.runner(lanes=LANES, graph_level=level)
    device, calls, inside = runner.device, [], []
    call = device.driver.call

    def listen(name: str, *arguments: Any, **words: Any) -> Any:
        if inside:
            calls.append(name)
        return call(name, *arguments, **words)

    timer = ChunkTimer(device)

    @contextmanager
    def chunk(stream: Any):
        with timer.held(stream):
            inside.append(True)
            yield
            inside.clear()

    lanes = runner.lanes(LANES)
    try:
        lanes.warm_up()
        program = program_for(read_bundle(stage.path), "ddim", 20)
        for index in range(LANES):
            lanes.start(program, seed=0, index=index, label=0)
        lanes.advance(2)  # everything has been done once
        monkeypatch.setattr(device.driver, "call", listen)
        lanes.around_chunk = chunk
        lanes.advance(rows)
        assert calls
        assert not {*calls} & WAITS
        assert not timer.interrupted, "the library waits for the device inside a row"
        assert timer.elapsed_ms() > 0
    finally:
        monkeypatch.undo()
        timer.close()
        lanes.close()
        runner.close()


def test_nan_in_one_lane_fails_that_image_alone(stage):
    with stage.engine(lanes=LANES) as engine:
        x_T = np.random.default_rng(0).normal(size=(3, *_channels_first(engine))).astype("f4")
        asked = {"steps": 5, "clip_denoised": False, "output": "float32", "label": 0}
        healthy = engine.sample(3, **asked, x_T=x_T)
        spoilt = x_T.copy()
        spoilt[1] = 3e38  # finite, and overflows in the network
        with pytest.raises(NonFiniteError, match="image 1 holds NaN or infinity after row"):
            engine.sample(3, **asked, x_T=spoilt)
        assert bits(engine.sample(3, **asked, x_T=x_T)) == bits(healthy)
    spoilt[1] = np.nan
    runner = stage.runner(lanes=LANES)
    lanes = runner.lanes(LANES)
    try:
        program = program_for(read_bundle(stage.path), "ddim", 5)
        runs = []
        for images in (x_T, spoilt):
            for index in range(3):
                lanes.start(program, seed=0, index=index, label=0, initial=images[index], tag=index)
            runs.append({lane.tag: lane for lane in lanes.advance(len(program))})
    finally:
        lanes.close()
        runner.close()
    assert runs[1][1].failed_row == 0
    for index in (0, 2):
        assert bits(runs[1][index].image) == bits(runs[0][index].image)


def test_out_of_memory_is_refused_and_the_engine_goes_on(stage):
    with stage.engine() as engine:
        expected = engine.sample(2, seed=1, steps=4)
        size = int(np.prod(_channels_first(engine)))
        lanes = 1 << (8 * stage.leave_bytes // (32 * size)).bit_length()  # ≥ 16 · size bytes each
        with open_device() as other, _memory_taken(other, leave_bytes=stage.leave_bytes):
            with pytest.raises(OutOfDeviceMemoryError) as caught:
                engine.sample(lanes, seed=1, steps=4, batch_size=lanes)
            assert f"neither {lanes} nor {lanes // 2} images at once" in str(caught.value)
        assert bits(engine.sample(2, seed=1, steps=4)) == bits(expected)


def _channels_first(engine: Engine) -> tuple[int, int, int]:
    height, width, channels = engine.image_shape
    return channels, height, width


@contextmanager
def _memory_taken(device: Any, *, leave_bytes: int):
    """Hold all of the device's memory but a little: in one piece, or as large as there is one."""
    free, _ = device.driver.call("cuMemGetInfo")
    held, piece = [], free - leave_bytes
    take: Callable[[int], Any] = device.allocate
    while piece >= leave_bytes:
        try:
            held.append(take(piece))
        except OutOfDeviceMemoryError:
            piece //= 2
            continue
        piece = device.driver.call("cuMemGetInfo")[0] - leave_bytes
    try:
        yield
    finally:
        for memory in held:
            memory.close()
