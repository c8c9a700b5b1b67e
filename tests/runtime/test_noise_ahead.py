"""ddpm_runtime/noise_ahead.py: drawn ahead, the same bits; and what a row allocates."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from ddpm_runtime import noise_ahead
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.noise import fill_noise, noise
from ddpm_runtime.noise_ahead import NoiseAhead
from ddpm_runtime.samplers import build_program
from ddpm_runtime.schedule import make_schedule

ROWS = 50


def lane(index: int, row: int = 0, seed: int = 3) -> SimpleNamespace:
    return SimpleNamespace(program=range(ROWS), row=row, seed=seed, index=index)


def check(ahead: NoiseAhead, lanes: list, size: int) -> None:
    present = ahead.present(lanes)
    assert present.shape == (len(lanes), size)
    for values, one in zip(present, lanes, strict=True):
        assert (values == noise(one.seed, one.index, one.row + 1, size)).all()


@pytest.mark.parametrize("size", [5, 784, 30_000])
def test_every_row_gets_its_own_draw_whoever_comes_goes_or_changes_places(size):
    rng = np.random.default_rng(size)
    ahead, lanes = NoiseAhead(4, size), [lane(0), lane(1, row=7)]
    for _ in range(60):
        check(ahead, lanes, size)
        for one in lanes:
            one.row = (one.row + 1) % ROWS
        event = rng.integers(8)
        if event == 0 and len(lanes) > 1:
            lanes.pop(0)
        elif event == 1 and len(lanes) < 4:
            lanes.append(lane(int(rng.integers(2**40)), row=int(rng.integers(ROWS))))
        elif event == 2:
            lanes.reverse()
        elif event == 3:  # a row without noise in between
            for one in lanes:
                one.row = (one.row + 1) % ROWS
        elif event == 4:  # one lane alone goes on
            lanes[0].row = (lanes[0].row + 1) % ROWS
        elif event == 5:  # another image takes a place, at the same row
            lanes[-1] = lane(int(rng.integers(2**40)), row=lanes[-1].row)


def test_the_same_row_asked_twice_is_the_same_noise():
    ahead, lanes = NoiseAhead(2, 10), [lane(4, row=9), lane(5)]
    check(ahead, lanes, 10)
    check(ahead, lanes, 10)


def test_one_small_image_is_drawn_for_many_rows_at_once_and_never_past_its_program(monkeypatch):
    filled = []

    def counted(out, *arguments):
        filled.append(len(out))
        fill_noise(out, *arguments)

    monkeypatch.setattr(noise_ahead, "fill_noise", counted)
    ahead, one = NoiseAhead(1, 784), lane(0)
    for one.row in range(ROWS):
        check(ahead, [one], 784)
    assert filled == [20, 20, 10]


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m"])
def test_a_row_allocates_no_buffer_of_images(sampler, guidance_scale):
    batch, image = 64, (1, 28, 28)
    backend = FunctionBackend(lambda sample, timestep, label: sample, image, num_classes=10)
    made = build_program(
        sampler,
        schedule=make_schedule(num_train_timesteps=100),
        prediction_type="epsilon",
        num_inference_steps=40,
    )
    lanes = HostLanes(backend, batch)
    for index in range(batch):
        lanes.start(made, seed=0, index=index, label=1, guidance_scale=guidance_scale)
    lanes.advance(3)  # every register is in use
    tracemalloc.start()
    try:
        lanes.advance()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        lanes.advance(20)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # NumPy sums in float64 through a buffer of 64 or 128 KiB, by its version; images take 196
    assert peak - before < batch * 4 * np.prod(image)
    assert after - before < 4096
