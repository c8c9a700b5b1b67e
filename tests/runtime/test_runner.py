"""ddpm_runtime/runner.py: where a network runs, what excludes what, and what is said of it."""

from __future__ import annotations

import importlib.util
import threading

import numpy as np
import pytest

from ddpm_runtime import Engine
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.cuda.levels import LEVELS
from ddpm_runtime.errors import (
    BackendUnavailableError,
    ConfigurationError,
    LifecycleError,
    OutOfDeviceMemoryError,
)
from ddpm_runtime.lane_pool import LanePool
from ddpm_runtime.runner import GRAPH_LEVELS, HostRunner, Opening, open_runner

EXCLUDED = {
    "a device that is no device": ({"device": "tpu"}, "possible: auto, cpu, cuda"),
    "a device number that is none": ({"device": "cuda:x"}, "unknown device 'cuda:x'"),
    "TensorRT on the processor": ({"device": "cpu", "backend": "tensorrt"}, "device='cuda'"),
    "a plan on the processor": ({"device": "cpu", "plan": "p.plan"}, "plan='p.plan'"),
    "graphs on the processor": ({"device": "cpu", "graph_level": "L1"}, "for CUDA devices"),
    "OpenVINO on a GPU": ({"device": "cuda", "backend": "openvino"}, "for the processor"),
    "calibration on a GPU": ({"device": "cuda:1", "backend": "fastest"}, "for the processor"),
    "OpenVINO with a plan": ({"backend": "openvino", "plan": "p.plan"}, "backend='openvino'"),
    "threads on a GPU": ({"device": "cuda", "threads": 2}, "threads=2 is for the processor"),
    "another precision on a GPU": ({"device": "cuda", "precision": "bf16"}, "--precision bf16"),
    "a plan for ONNX Runtime": (
        {"device": "cuda", "backend": "onnxruntime", "plan": "p.plan"},
        "TensorRT's",
    ),
    "trust without a plan": ({"device": "cuda", "trust_plan": True}, "needs the plan"),
    "no lanes": ({"lanes": 0}, "lanes must be ≥ 1"),
    "an unknown level": ({"graph_level": "L3"}, "possible: L0, L1, L2, auto"),
    "fp16 of an fp32 bundle": ({"device": "cpu", "precision": "fp16"}, "ddpm-export --precision"),
}


@pytest.mark.parametrize("name", EXCLUDED)
def test_what_excludes_each_other_is_refused_with_the_way_out(tiny_engine_path, name):
    choices, words = EXCLUDED[name]
    with pytest.raises(ConfigurationError, match=words):
        open_runner(read_bundle(tiny_engine_path), Opening(**choices))


def test_the_levels_offered_are_those_there_are():
    assert set(GRAPH_LEVELS) == {"auto", *LEVELS}


def test_auto_takes_the_processor_where_no_gpu_can_be_used(tiny_engine_path, monkeypatch):
    monkeypatch.setenv("DDPM_DEVICE", "")
    monkeypatch.setattr(
        "ddpm_runtime.cuda.runner.open_device", refuse("cuInit answered CUDA_ERROR_NO_DEVICE")
    )
    with Engine.load(tiny_engine_path) as engine:
        assert "no GPU: cuInit answered CUDA_ERROR_NO_DEVICE" in engine.description
        assert engine.sample(1).shape == (1, 8, 8, 1)
    with pytest.raises(BackendUnavailableError, match="NO_DEVICE"):  # asked for: no falling back
        Engine.load(tiny_engine_path, device="cuda")


def test_auto_does_not_complain_of_bindings_nobody_installed(tiny_engine_path, monkeypatch):
    monkeypatch.setenv("DDPM_DEVICE", "")
    monkeypatch.setattr(
        "ddpm_runtime.cuda.runner.open_device",
        refuse("cuda-bindings is needed and is not installed"),
    )
    with Engine.load(tiny_engine_path) as engine:
        assert "GPU" not in engine.description


def refuse(words):
    def open_device(ordinal):
        raise BackendUnavailableError(words)

    return open_device


def test_the_environment_can_make_auto_the_processor(tiny_engine_path, monkeypatch):
    monkeypatch.setenv("DDPM_DEVICE", "cpu")
    monkeypatch.setattr("ddpm_runtime.cuda.runner.open_device", refuse("looked for a GPU"))
    with Engine.load(tiny_engine_path) as engine:
        assert "GPU" not in engine.description


def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(tiny_engine_path):
    if importlib.util.find_spec("cuda") is None:
        words = r"pip install 'ddpm-engine\[cuda\]'"
    else:
        words = "device='cpu'|this process sees"  # no driver, or no such device
    with pytest.raises(BackendUnavailableError, match=words):
        Engine.load(tiny_engine_path, device="cuda:99")


def test_fixed_lanes_on_the_processor_bound_what_is_in_flight(tiny_engine_path):
    counts = []
    with Engine.load(tiny_engine_path, lanes=3) as engine:
        engine.sample(8, steps=2, on_step=lambda event: counts.append(len(event.previews())))
        few = engine.sample(8, steps=2)
    assert max(counts) == 3
    with Engine.load(tiny_engine_path) as engine:
        assert (few == engine.sample(8, steps=2)).all()


# --- the pool ----------------------------------------------------------------------------------


class Counting(HostRunner):
    """A runner that writes down what is made and closed, and may be out of memory."""

    def __init__(self, *, room: int = 10**9) -> None:
        super().__init__(backend=FunctionBackend(lambda x, t, y: x, (1, 2, 2)), reason="test")
        object.__setattr__(self, "made", [])
        object.__setattr__(self, "closed", [])
        object.__setattr__(self, "room", room)

    def lanes(self, capacity):
        if len(self.made) - len(self.closed) >= self.room:
            raise OutOfDeviceMemoryError("full")
        lanes = super().lanes(capacity)
        lanes.close = lambda: self.closed.append(lanes)
        self.made.append(lanes)
        return lanes

    def close(self):
        self.closed.append("runner")


def test_lanes_are_kept_for_the_thread_and_the_capacity_they_were_made_for():
    pool = LanePool(Counting())
    first = pool.take(2)
    pool.give_back(first)
    assert pool.take(2) is first
    other = pool.take(2)
    assert other is not first
    pool.give_back(first)
    pool.give_back(other)
    assert pool.runner.closed == [first]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(pool.take(2)))
    thread.start()
    thread.join()
    assert seen[0] is not other


def test_what_was_used_longest_ago_and_what_belongs_to_dead_threads_is_closed():
    pool = LanePool(Counting())
    thread = threading.Thread(target=lambda: pool.give_back(pool.take(99)))
    thread.start()
    thread.join()
    for capacity in range(1, 12):
        pool.give_back(pool.take(capacity))
    closed = [lanes.capacity for lanes in pool.runner.closed]
    assert closed == [99, 1, 2, 3]


def test_idle_lanes_make_room_when_memory_is_out():
    pool = LanePool(Counting(room=1))
    pool.give_back(pool.take(1))
    lent = pool.take(2)
    assert [lanes.capacity for lanes in pool.runner.closed] == [1]
    with pytest.raises(OutOfDeviceMemoryError):
        pool.take(3)
    pool.give_back(lent)


def test_the_runner_is_closed_when_the_last_lanes_are_back():
    pool = LanePool(Counting())
    lent, idle = pool.take(1), pool.take(2)
    pool.give_back(idle)
    pool.close()
    pool.close()
    assert pool.runner.closed == [idle]
    with pytest.raises(LifecycleError, match="load it again"):
        pool.take(1)
    pool.give_back(lent)
    assert pool.runner.closed[1] is lent
    assert pool.runner.closed[2:] == ["runner"]


def test_a_stream_goes_on_after_the_engine_is_closed_and_then_nothing_is_left(tiny_engine_path):
    engine = Engine.load(tiny_engine_path)
    expected = engine.sample(4, steps=3)
    stream = engine.stream(4, steps=3, batch_size=2)
    first = next(stream)
    engine.close()
    images = [first.image, *(sample.image for sample in stream)]
    assert (np.stack(images) == expected).all()
    with pytest.raises(LifecycleError):
        engine.sample(1)


def test_a_dropped_stream_does_not_keep_the_network(tiny_engine_path, monkeypatch):
    engine = Engine.load(tiny_engine_path)
    stream = engine.stream(3, steps=2)
    closed = []
    monkeypatch.setattr(type(engine._runner.backend), "close", lambda self: closed.append(True))
    engine.close()
    assert closed == [True]  # at once: the stream had not begun
    with pytest.raises(LifecycleError, match="load it again"):
        next(stream)
