"""The choice of a backend, the cache it is kept in, threads in containers, chunks of rows."""

from __future__ import annotations

import os

import numpy as np
import pytest

from ddpm_runtime.backends import calibration
from ddpm_runtime.backends.chunks import chunks
from ddpm_runtime.backends.function import FunctionBackend
from ddpm_runtime.backends.processors import usable_processors
from ddpm_runtime.backends.user_cache import UserCache
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import BackendError


@pytest.fixture
def two_backends(monkeypatch):
    """Two named backends with planted speeds, that count how often they are timed."""
    timed = []
    speeds = {"onnxruntime": 1.0, "openvino": 1.0}

    def opener(name):
        def open_it(_bundle, **_options):
            backend = FunctionBackend(lambda x, t, y: x, (1, 8, 8), num_classes=3)
            backend.name = name
            return backend

        return open_it

    def time_rows(binding, rows, _budget_s):
        timed.append(rows)
        return speeds["onnxruntime" if len(timed) % 4 in (1, 2) else "openvino"]

    monkeypatch.setattr(calibration, "time_rows", time_rows)
    monkeypatch.setattr(calibration, "is_installed", lambda _: True)
    return {name: opener(name) for name in speeds}, speeds, timed


@pytest.mark.parametrize(
    ("second", "chosen"), [(0.5, "openvino"), (0.95, "onnxruntime"), (2.0, "onnxruntime")]
)
def test_the_fastest_is_taken_unless_the_difference_is_small(
    tiny_engine_path, two_backends, second, chosen
):
    openers, speeds, _ = two_backends
    speeds["openvino"] = second
    backend, reason = calibration.fastest(read_bundle(tiny_engine_path), openers, {})
    assert backend.name == chosen
    assert "onnxruntime" in reason
    assert "openvino" in reason


def test_the_verdict_is_remembered(tiny_engine_path, two_backends):
    openers, speeds, timed = two_backends
    speeds["openvino"] = 0.5
    calibration.fastest(read_bundle(tiny_engine_path), openers, {})
    speeds["openvino"], measured = 9.0, len(timed)
    backend, reason = calibration.fastest(read_bundle(tiny_engine_path), openers, {})
    assert len(timed) == measured
    assert backend.name == "openvino"
    assert reason.endswith("measured before")


def test_a_backend_that_cannot_load_the_network_is_not_taken(tiny_engine_path, two_backends):
    openers, speeds, _ = two_backends
    speeds["openvino"] = 0.1

    def broken(_bundle, **_options):
        raise BackendError("no such operator")

    backend, _ = calibration.fastest(
        read_bundle(tiny_engine_path), {**openers, "openvino": broken}, {}
    )
    assert backend.name == "onnxruntime"


def test_what_was_stored_is_loaded_under_its_key_only(tmp_path):
    cache = UserCache(tmp_path / "cache")
    cache.store("thing", 1, "a", content=b"content")
    assert cache.load("thing", 1, "a") == b"content"
    assert cache.load("thing", 1, "b") is None
    assert cache.load("other", 1, "a") is None


def test_a_folder_that_others_may_enter_is_not_used(tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    cache = UserCache(folder)
    cache.store("thing", content=b"content")
    assert cache.folder is None
    assert list(folder.iterdir()) == []


def test_a_link_in_place_of_the_folder_or_a_file_is_not_followed(tmp_path):
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(real)
    assert UserCache(tmp_path / "link").folder is None
    cache = UserCache(real)
    cache.store("thing", content=b"content")
    (file,) = real.iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    assert cache.load("thing") is None


def test_an_empty_variable_turns_the_cache_off(monkeypatch):
    monkeypatch.setenv("DDPM_ENGINE_CACHE", "")
    cache = UserCache()
    cache.store("thing", content=b"content")
    assert cache.load("thing") is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "5000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({}, None),
    ],
)
def test_a_containers_quota_limits_the_threads(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    assert usable_processors(tmp_path) == (expected or 8)


@pytest.mark.parametrize("smallest", [1, 2])
@pytest.mark.parametrize("largest", [2, 16])
def test_chunks_cover_every_row_once_with_little_padding(smallest, largest):
    for rows in range(1, 70):
        found = chunks(rows, smallest=smallest, largest=largest)
        covered = np.concatenate([np.arange(c.start, c.start + c.size) for c in found])
        assert np.array_equal(covered, np.arange(len(covered)))
        assert rows <= len(covered) <= max(rows + smallest - 1, rows * 4 / 3)
        assert all(smallest <= c.size <= largest for c in found)
        assert all(c.size & (c.size - 1) == 0 for c in found)
