"""ddpm_runtime/backends/side_by_side.py: every row once, the same bits, nothing left running."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.backends.side_by_side import Crew, shares
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import BackendError


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 7, 16, 64])
def test_every_row_is_taken_once_by_threads_that_are_done_together(threads):
    side_by_side = 0
    for rows in range(1, 300):
        taken = shares(rows, threads)
        if taken is None:
            continue
        side_by_side += 1
        assert len(taken) == min(rows, threads)
        every = sorted(row for chunks in taken for c in chunks for row in range(c.start, c.stop))
        assert every == list(range(rows))
        assert all(1 <= chunk.stop - chunk.start <= 8 for chunks in taken for chunk in chunks)
        loads = [sum(chunk.stop - chunk.start for chunk in chunks) for chunks in taken]
        assert max(loads) <= 1.125 * rows / threads
    assert side_by_side > 80


def test_few_rows_share_their_operators():
    assert shares(1, 2) is None
    assert shares(3, 2) is None
    assert shares(3, 4) is None
    assert shares(2, 2) == [[slice(0, 1)], [slice(1, 2)]]
    assert shares(1, 1) == [[slice(0, 1)]]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_a_row_has_the_same_bits_however_the_rows_are_shared(unet_engine_path, threads):
    bundle, capacity = read_bundle(unet_engine_path), 37
    reference = open_ort(bundle, threads=1).allocate(1)
    random = np.random.default_rng(3)
    sample = random.standard_normal((capacity, *bundle_image(bundle)), np.float32)
    timestep = np.linspace(0, 999, capacity, dtype=np.float32)
    label = np.arange(capacity) % 4
    expected = []
    for row in range(capacity):
        reference.sample[0], reference.timestep[0] = sample[row], timestep[row]
        reference.label[0] = label[row]
        reference.run(1)
        expected.append(reference.prediction[0].copy())
    backend = open_ort(bundle, threads=threads)
    binding = backend.allocate(capacity)
    binding.sample[:], binding.timestep[:], binding.label[:] = sample, timestep, label
    for rows in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 36, 37):
        binding.prediction[:] = np.nan
        binding.run(rows)
        assert (binding.prediction[:rows] == np.stack(expected[:rows])).all(), rows
        assert np.isnan(binding.prediction[rows:]).all(), rows
    backend.close()


def bundle_image(bundle):
    image = bundle.manifest.image
    return image.channels, image.height, image.width


def test_bindings_of_several_threads_do_not_meet(unet_engine_path):
    backend = open_ort(read_bundle(unet_engine_path), threads=2)
    found = {}

    def work(seed):
        binding = backend.allocate(8)
        binding.sample[:] = np.random.default_rng(seed).standard_normal(binding.sample.shape)
        binding.run(8)
        alone = binding.prediction.copy()
        found[seed] = []
        for _ in range(20):
            binding.prediction[:] = np.nan
            binding.run(8)
            found[seed].append((binding.prediction == alone).all())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(len(same) == 20 and all(same) for same in found.values())
    backend.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_is_raised_when_nothing_is_under_way_any_more(failing):
    crew, done = Crew(3), []

    def work(number):
        def run():
            if number == failing:
                raise ValueError(str(number))
            time.sleep(0.05)
            done.append(number)

        return run

    with pytest.raises(ValueError, match=str(failing)):
        crew.run([work(number) for number in range(3)])
    assert sorted(done) == sorted({0, 1, 2} - {failing})
    crew.run([work(3)])  # and it can go on
    crew.close()
    crew.close()


def test_a_network_that_fails_beside_another_is_a_backend_error(unet_engine_path):
    backend = open_ort(read_bundle(unet_engine_path), threads=2)
    binding = backend.allocate(4)
    binding.label[3] = 99  # the second thread looks up a class that there is not
    with pytest.raises(BackendError, match="4 network rows"):
        binding.run(4)
    binding.label[3] = 0
    binding.run(4)
    assert np.isfinite(binding.prediction).all()
    backend.close()
