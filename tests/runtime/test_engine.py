"""ddpm_runtime/engine.py over a real ONNX network: what an application relies on."""

from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
import threading

import numpy as np
import pytest

from ddpm_runtime import ConfigurationError, Engine, LifecycleError, NonFiniteError
from helpers.tiny_engine import write_tiny_engine

SETTINGS = {"seed": 1, "steps": 8, "label": "all", "guidance_scale": 2.0}


@pytest.fixture
def engine(tiny_engine_path):
    with Engine.load(tiny_engine_path) as loaded:
        yield loaded


def bits(images) -> str:
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def test_images_are_uint8_height_width_channels(engine):
    images = engine.sample(3, **SETTINGS)
    assert images.shape == (3, *engine.image_shape) == (3, 8, 8, 1)
    assert images.dtype == np.uint8
    floats = engine.sample(3, **SETTINGS, output="float32")
    assert floats.shape == (3, 1, 8, 8)
    expected = np.clip(np.rint((floats.astype(float) + 1) * 127.5), 0, 255)
    assert (images == expected.transpose(0, 2, 3, 1)).all()


def test_the_five_lines_of_the_design_hold(engine):
    images = engine.sample(64, seed=0, steps=50, sampler="ddim")
    one = engine.sample(1, seed=0, first_index=7, steps=50, sampler="ddim")[0]
    assert (one == images[7]).all()


@pytest.mark.parametrize("batch_size", [*range(1, 33)])
def test_the_batch_size_never_changes_a_bit(engine, batch_size):
    images = engine.sample(33, **SETTINGS, sampler="ddpm", output="float32", batch_size=batch_size)
    reference = engine.sample(33, **SETTINGS, sampler="ddpm", output="float32", batch_size=33)
    assert bits(images) == bits(reference)


def test_threads_and_restarts_never_change_a_bit(tiny_engine_path):
    code = (
        "import sys, hashlib, numpy as np; from ddpm_runtime import Engine; "
        "e = Engine.load(sys.argv[1], threads=int(sys.argv[2])); "
        "x = e.sample(9, seed=1, steps=8, label='all', guidance_scale=2.0, output='float32'); "
        "print(hashlib.sha256(x.tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tiny_engine_path), threads],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "1")
    }
    assert len(digests) == 1


def test_eight_threads_at_once_get_the_images_one_gets(engine):
    expected = bits(engine.sample(5, **SETTINGS))
    found = []

    def work():
        for _ in range(10):
            found.append(bits(engine.sample(5, **SETTINGS)))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 80


def test_stream_yields_the_same_images_and_may_be_left_early(engine):
    images = engine.sample(6, **SETTINGS)
    seen = {s.index: s.image for s in engine.stream(6, **SETTINGS, batch_size=2)}
    assert all((seen[i] == images[i]).all() for i in range(6))
    stream = engine.stream(6, **SETTINGS, batch_size=2)
    next(stream)
    stream.close()
    assert bits(engine.sample(6, **SETTINGS)) == bits(images)


def test_progress_reaches_its_total_and_previews_show_every_image_in_flight(engine):
    events = []

    def on_step(event):
        events.append((event.rows_done, event.rows_total, set(event.previews())))

    engine.sample(5, steps=4, batch_size=2, on_step=on_step, first_index=10)
    assert [done for done, _, _ in events] == [2, 4, 6, 8, 10, 12, 14, 16, 17, 18, 19, 20]
    assert {total for _, total, _ in events} == {20}
    assert events[0][2] == {10, 11}
    assert events[-1][2] == {14}


def test_labels_by_name_number_list_and_in_turn_agree(engine):
    by_name = engine.sample(2, steps=3, label="square")
    assert bits(by_name) == bits(engine.sample(2, steps=3, label=1))
    assert bits(by_name) == bits(engine.sample(2, steps=3, label="1"))
    assert bits(by_name) == bits(engine.sample(2, steps=3, label=[1, "Square"]))
    dealt = engine.sample(4, steps=3, label="all", first_index=2)
    assert bits(dealt) == bits(engine.sample(4, steps=3, label=[2, 0, 1, 2], first_index=2))


def test_the_bundle_says_what_happens_when_nobody_does(tmp_path):
    path = write_tiny_engine(tmp_path / "e.engine", steps=3, guidance_scale=2.0, spacing="trailing")
    with Engine.load(path) as engine:
        default = engine.sample(2, label=1)
        said = engine.sample(2, label=1, steps=3, guidance_scale=2.0, spacing="trailing")
        assert bits(default) == bits(said)
        assert bits(default) != bits(engine.sample(2, label=1, guidance_scale=1.0))


BAD_REQUESTS = {
    "no images": ({"n": 0}, "≥ 1"),
    "no steps": ({"steps": 0}, "between 1 and 100"),
    "more steps than T": ({"steps": 101}, "nearest valid choice is 100"),
    "unknown sampler": ({"sampler": "dimm"}, "Did you mean 'ddim'"),
    "eta too large": ({"eta": 1.5}, r"\[0, 1\]"),
    "eta for ddpm": ({"sampler": "ddpm", "eta": 0.5}, "option of the ddpm sampler"),
    "class too large": ({"label": 3}, "classes 0 to 2"),
    "negative class": ({"label": -1}, "classes 0 to 2"),
    "unknown class name": ({"label": "sqare"}, "Did you mean 'square'"),
    "two labels for one image": ({"label": [0, 1]}, "2 labels for 1"),
    "guidance without a class": ({"guidance_scale": 2.0}, "give label"),
    "guidance not a number": ({"label": 0, "guidance_scale": float("nan")}, "finite"),
    "negative seed": ({"seed": -1}, r"2\^64"),
    "index beyond 64 bits": ({"first_index": 2**64}, r"2\^64"),
    "no batch": ({"batch_size": 0}, "batch size"),
    "unknown spacing": ({"spacing": "even"}, "timestep spacing"),
    "unknown output": ({"output": "float64"}, "uint8"),
}


@pytest.mark.parametrize("kind", BAD_REQUESTS)
def test_a_bad_request_is_refused_with_the_remedy(engine, kind):
    request, remedy = BAD_REQUESTS[kind]
    with pytest.raises(ConfigurationError, match=remedy):
        engine.sample(**request)
    with pytest.raises(ConfigurationError, match=remedy):
        engine.stream(**request)  # refused before the first image is asked for


def test_a_label_for_an_unconditional_network_is_refused(tmp_path):
    path = write_tiny_engine(tmp_path / "e.engine", num_classes=0)
    with Engine.load(path) as engine:
        assert engine.sample(1).shape == (1, 8, 8, 1)
        with pytest.raises(ConfigurationError, match="unconditional"):
            engine.sample(1, label=0)


def test_unknown_devices_and_backends_are_refused(tiny_engine_path):
    with pytest.raises(ConfigurationError, match="possible: auto, cpu"):
        Engine.load(tiny_engine_path, device="tpu")
    with pytest.raises(ConfigurationError, match="onnxruntime"):
        Engine.load(tiny_engine_path, backend="onnxruntme")
    with pytest.raises(ConfigurationError, match="threads"):
        Engine.load(tiny_engine_path, threads=0)


def test_a_closed_engine_says_to_load_again(tiny_engine_path):
    engine = Engine.load(tiny_engine_path)
    engine.close()
    engine.close()
    with pytest.raises(LifecycleError, match="load"):
        engine.sample(1)


def test_an_image_that_is_not_finite_is_an_error_that_names_it(tmp_path):
    path = write_tiny_engine(tmp_path / "e.engine")
    with Engine.load(path) as engine:
        backend = engine._runner.backend
        binding = backend.allocate
        backend.allocate = lambda capacity: poisoned(binding(capacity))
        with pytest.raises(NonFiniteError, match=r"image 0 .* row 0 of 10"):
            engine.sample(1)


def poisoned(binding):
    import dataclasses

    def run(rows):
        binding.run(rows)
        binding.prediction[:rows] = np.nan

    return dataclasses.replace(binding, run=run)


def _sample_in_child(engine, queue):
    try:
        engine.sample(1)
        queue.put("sampled")
    except LifecycleError as error:
        queue.put(str(error))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of fork and threads
def test_an_engine_loaded_before_a_fork_refuses_in_the_child(engine):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sample_in_child, args=(engine, queue))
    child.start()
    assert "load it in the child" in queue.get(timeout=30)
    child.join()


def test_the_engine_says_what_it_runs_on_and_why(engine):
    assert "ONNX Runtime" in engine.description
    assert "automatic" in engine.description
