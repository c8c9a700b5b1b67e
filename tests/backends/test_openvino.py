"""OpenVINO: the network's numbers, an image's bits, what is kept on disk, what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings

import msgspec
import numpy as np
import pytest

from ddpm_runtime import Engine
from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.backends.ov import open_openvino
from ddpm_runtime.backends.user_cache import UserCache
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import (
    BackendError,
    BackendUnavailableError,
    ConfigurationError,
    LifecycleError,
    NetworkMismatchError,
)
from helpers.tiny_engine import tiny_network_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")

CAPABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(
    "BF16" not in CAPABILITIES, reason="this processor computes no bfloat16"
)


def evaluate(backend, rows, capacity=None, order=None):
    """Predictions for the first ``rows`` of fixed noise, in some order."""
    binding = backend.allocate(capacity or rows)
    random = np.random.default_rng(7)
    sample = random.standard_normal((64, *backend.shape.image), np.float32)
    order = np.arange(rows) if order is None else order
    binding.sample[:rows] = sample[order]
    binding.timestep[:rows] = np.linspace(0, 999, 64, dtype=np.float32)[order]
    binding.label[:rows] = (order % (backend.shape.num_classes + 1))[:rows]
    binding.run(rows)
    return binding.prediction[:rows].copy()


def test_openvino_agrees_with_onnx_runtime(unet_engine_path):
    bundle = read_bundle(unet_engine_path)
    expected = evaluate(open_ort(bundle), 5)
    found = evaluate(open_openvino(bundle), 5)
    # float32 sums in another order: a few dozen roundings of 6e-8
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@needs_bf16
def test_bf16_is_another_precision_and_only_when_asked(unet_engine_path):
    bundle = read_bundle(unet_engine_path)
    expected = evaluate(open_openvino(bundle), 4)
    auto = evaluate(open_openvino(bundle, precision="auto"), 4)
    bf16 = evaluate(open_openvino(bundle, precision="bf16"), 4)
    assert np.array_equal(auto, expected)
    error = np.abs(bf16 - expected).max() / np.abs(expected).max()
    assert 1e-4 < error < 0.1  # eight bits of mantissa, through a few dozen layers


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_row_has_the_same_bits_in_every_batch(unet_engine_path, precision):
    backend = open_openvino(read_bundle(unet_engine_path), precision=precision)
    expected = evaluate(backend, 32)
    for rows in (*range(1, 10), 12, 15, 16, 17, 24, 31, 32):
        assert np.array_equal(evaluate(backend, rows), expected[:rows]), rows
    for rows in (1, 3, 5, 20):
        assert np.array_equal(evaluate(backend, rows, capacity=32), expected[:rows]), rows


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_row_has_the_same_bits_in_every_place(unet_engine_path, precision):
    backend = open_openvino(read_bundle(unet_engine_path), precision=precision)
    expected = evaluate(backend, 32)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(32)[:21]
        assert np.array_equal(evaluate(backend, 21, order=order), expected[order])


def test_images_do_not_depend_on_the_batch_size(unet_engine_path):
    with Engine.load(unet_engine_path, backend="openvino") as engine:
        expected = engine.sample(7, label="all", guidance_scale=2.0, output="float32")
        for batch_size in (1, 2, 3, 5):
            found = engine.sample(
                7, label="all", guidance_scale=2.0, output="float32", batch_size=batch_size
            )
            assert np.array_equal(found, expected)


def test_a_second_start_reads_what_the_first_compiled(unet_engine_path, cache_folder, monkeypatch):
    bundle = read_bundle(unet_engine_path)
    expected = evaluate(open_openvino(bundle), 3)
    assert cache_folder.stat().st_mode & 0o777 == 0o700
    unreadable = msgspec.structs.replace(bundle.manifest)
    second = type(bundle)(
        manifest=unreadable, network_bytes=b"not read again", schedule=bundle.schedule
    )
    assert np.array_equal(evaluate(open_openvino(second), 3), expected)


def test_a_damaged_cache_costs_time_and_not_the_result(unet_engine_path, cache_folder):
    bundle = read_bundle(unet_engine_path)
    expected = evaluate(open_openvino(bundle), 3)
    for file in cache_folder.iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    assert np.array_equal(evaluate(open_openvino(bundle), 3), expected)


def test_a_closed_backend_says_so(tiny_engine_path):
    backend = open_openvino(read_bundle(tiny_engine_path))
    binding = backend.allocate(2)
    backend.close()
    backend.close()
    with pytest.raises(LifecycleError, match="load the engine again"):
        binding.run(1)
    with pytest.raises(LifecycleError, match="load the engine again"):
        backend.allocate(1)


def test_a_network_that_is_not_the_manifests_is_refused_when_it_is_loaded(tiny_engine_path):
    bundle = read_bundle(tiny_engine_path)
    other = type(bundle)(
        manifest=bundle.manifest,
        network_bytes=tiny_network_bytes(size=16, num_classes=3),
        schedule=bundle.schedule,
    )
    with pytest.raises(NetworkMismatchError, match="ddpm-export"):
        open_openvino(other)


def test_bytes_that_are_no_network_are_refused(tiny_engine_path):
    bundle = read_bundle(tiny_engine_path)
    broken = type(bundle)(
        manifest=bundle.manifest, network_bytes=b"junk" * 9, schedule=bundle.schedule
    )
    with pytest.raises(BackendError, match="backend='onnxruntime'"):
        open_openvino(broken)


def test_impossible_requests_are_refused(tiny_engine_path):
    with pytest.raises(ConfigurationError, match="possible: auto, bf16, fp16, fp32"):
        Engine.load(tiny_engine_path, precision="int8")
    with pytest.raises(ConfigurationError, match="on the processor there are fp32 and bf16"):
        Engine.load(tiny_engine_path, precision="fp16")
    with pytest.raises(ConfigurationError, match="backend='openvino'"):
        Engine.load(tiny_engine_path, backend="onnxruntime", precision="bf16")
    with pytest.raises(ConfigurationError, match="threads must be ≥ 1"):
        Engine.load(tiny_engine_path, backend="openvino", threads=0)


@needs_bf16
def test_auto_takes_the_backend_that_has_the_precision(tiny_engine_path):
    with Engine.load(tiny_engine_path, precision="bf16") as engine:
        assert "OpenVINO" in engine.description
        assert "bf16" in engine.description
        assert engine.sample(2).shape == (2, 8, 8, 1)


def test_without_openvino_the_pip_line_is_given(tiny_engine_path, tmp_path):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "openvino":
            raise ImportError("No module named openvino")
sys.meta_path.insert(0, Block())
from ddpm_runtime import Engine
from ddpm_runtime.errors import BackendUnavailableError
with Engine.load(sys.argv[1], backend="fastest") as engine:
    assert "openvino is not installed" in engine.description, engine.description
try:
    Engine.load(sys.argv[1], backend="openvino")
except BackendUnavailableError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_engine_path)], capture_output=True, text=True
    )
    assert "pip install 'ddpm-engine[openvino]'" in done.stdout, done.stderr
    assert issubclass(BackendUnavailableError, BackendError)


@needs_bf16
def test_a_network_that_bf16_spoils_is_refused_with_what_names_the_layer(
    unet_engine_path, monkeypatch, tmp_path
):
    bundle, cache = read_bundle(unet_engine_path), UserCache(tmp_path)
    assert "% from fp32" in open_openvino(bundle, precision="bf16", cache=cache).description
    monkeypatch.setattr("ddpm_runtime.backends.ov_compiler._LARGEST_ERROR", 1e-5)
    for _ in range(2):  # measured, then remembered
        with pytest.raises(ConfigurationError, match=r"from those in float32.*ddpm-export --prec"):
            open_openvino(bundle, precision="bf16", cache=cache)
    open_openvino(bundle, precision="fp32", cache=cache)


def test_step_caching_is_refused(unet_engine_path):
    with pytest.raises(ConfigurationError, match="OpenVINO, which has no step caching"):
        open_openvino(read_bundle(unet_engine_path)).allocate_cached(2)
