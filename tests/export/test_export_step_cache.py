"""ddpm_export/step_cache.py: the network in two parts, which together are the network."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ddpm_export.again import bundle_from_engine
from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint
from ddpm_export.step_cache import StepCacheReport
from ddpm_runtime import Engine
from ddpm_runtime.backends.ort import open_ort
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import ConfigurationError, IntegrityError, ParityError
from helpers.tiny_engine import write_tiny_engine


@pytest.fixture(scope="module")
def cached(shipped_engine_path, tmp_path_factory):
    """The shipped engine, parted at its outermost skip connection."""
    path = tmp_path_factory.mktemp("cached") / "fashion.engine"
    return path, bundle_from_engine(shipped_engine_path, path, step_cache=1, threads=1)


def test_the_parts_are_the_network_and_the_network_is_unchanged(cached, shipped_engine_path):
    path, report = cached
    before, after = read_bundle(shipped_engine_path), read_bundle(path)
    assert after.network_bytes == before.network_bytes
    assert report.relative_error <= 1e-6
    assert report.deep == after.manifest.network.step_cache.deep == (32, 28, 28)
    assert report.nodes[1] < report.nodes[0] / 5
    assert after.manifest.parity["step_cache"]["relative_error"] == report.relative_error
    assert len(after.cached.shallow_bytes) < len(after.network_bytes) / 20


def test_the_same_engine_gives_the_same_parts(cached, shipped_engine_path, tmp_path):
    path, _ = cached
    bundle_from_engine(shipped_engine_path, tmp_path / "again.engine", step_cache=1, threads=1)
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "again.engine" / file.name).read_bytes()


def test_images_without_an_interval_are_those_of_the_engine_before(cached, shipped_engine_path):
    path, _ = cached
    asked = {"n": 2, "label": "all", "steps": 6, "sampler": "ddim", "seed": 4}
    with Engine.load(shipped_engine_path) as before, Engine.load(path) as after:
        assert (before.sample(**asked) == after.sample(**asked)).all()
        near = after.sample(**asked, cache_interval=2)
        far = after.sample(**asked, cache_interval=6)
        plain = before.sample(**asked).astype(int)
        drift = [np.abs(plain - images).mean() for images in (near, far)]
    assert 0 < drift[0] < drift[1]  # lossy, and more so the longer features are kept


def test_a_cached_image_does_not_depend_on_its_batch(cached):
    path, _ = cached
    asked = {"label": "all", "steps": 5, "sampler": "ddim", "cache_interval": 2}
    with Engine.load(path) as engine:
        together = engine.sample(5, guidance_scale=2.0, **asked)
        alone = engine.sample(1, first_index=3, guidance_scale=2.0, **asked)
        few = engine.sample(5, guidance_scale=2.0, batch_size=2, **asked)
    assert (together[3] == alone[0]).all()
    assert (together == few).all()


@pytest.mark.parametrize("skips", [2, 6])
def test_it_can_be_parted_deeper(shipped_engine_path, tmp_path, skips):
    report = bundle_from_engine(
        shipped_engine_path, tmp_path / "deep.engine", step_cache=skips, threads=1
    )
    assert report.skips == skips
    assert report.relative_error <= 1e-6


def test_the_command_says_what_it_made(command, shipped_engine_path, tmp_path):
    path = tmp_path / "c.engine"
    code, out, err = command(shipped_engine_path, "--step-cache", 1, "-o", path, "--threads", 1)
    assert code == 0, err
    assert "1 skip connection(s) outside, deep features 32×28×28" in out
    assert read_bundle(path).cached is not None


def test_lowering_an_engine_with_a_cache_leaves_the_cache_out(cached, tmp_path):
    bundle_from_engine(cached[0], tmp_path / "low.engine", precision="fp16", threads=1)
    assert read_bundle(tmp_path / "low.engine").cached is None


def test_impossible_requests_say_what_is_possible(shipped_engine_path, tmp_path, cached):
    out = tmp_path / "x.engine"
    with pytest.raises(ConfigurationError, match=r"has 6 skip connections.*Choose 1 to 6"):
        bundle_from_engine(shipped_engine_path, out, step_cache=7)
    with pytest.raises(ConfigurationError, match="one of them at a time"):
        bundle_from_engine(shipped_engine_path, out, step_cache=1, precision="fp16")
    with pytest.raises(ConfigurationError, match="ask for fp16, for bf16, or for a step cache"):
        bundle_from_engine(shipped_engine_path, out)
    tiny = write_tiny_engine(tmp_path / "tiny.engine")
    with pytest.raises(ConfigurationError, match="no skip connections: it is no U-Net"):
        bundle_from_engine(tiny, out, step_cache=1)
    with pytest.raises(ConfigurationError, match="together with bf16"):
        options = ExportOptions(precision="bf16", step_cache=1)
        bundle_from_checkpoint(tmp_path / "no.pt", out, options=options)
    bundle_from_engine(shipped_engine_path, tmp_path / "low.engine", precision="fp16", threads=1)
    with pytest.raises(ConfigurationError, match="in fp16; it is for float32 networks"):
        bundle_from_engine(tmp_path / "low.engine", out, step_cache=1)
    assert not out.exists()


def test_parts_that_are_not_the_network_are_refused():
    report = StepCacheReport(skips=1, deep=(1, 2, 3), nodes=(9, 2), relative_error=float("nan"))
    with pytest.raises(ParityError, match="--step-cache"):
        report.require()


def test_a_damaged_part_is_named(cached, shipped_engine_path, tmp_path):
    path = tmp_path / "damaged.engine"
    bundle_from_engine(shipped_engine_path, path, step_cache=1, threads=1)
    (path / "shallow.onnx").write_bytes(b"x" * (path / "shallow.onnx").stat().st_size)
    with pytest.raises(IntegrityError, match=r"shallow\.onnx is not the file"):
        Engine.load(path)


def test_a_part_with_other_tensors_is_refused(cached):
    bundle = read_bundle(cached[0])
    model = onnx.load_model_from_string(bundle.cached.shallow_bytes)
    model.graph.input.append(helper.make_tensor_value_info("extra", TensorProto.FLOAT, ["n"]))
    wrong = type(bundle.cached)(
        whole_bytes=bundle.cached.whole_bytes, shallow_bytes=model.SerializeToString()
    )
    backend = open_ort(type(bundle)(**{**vars(bundle), "cached": wrong}), threads=1)
    with pytest.raises(Exception, match="the manifest describes inputs"):
        backend.allocate_cached(2)
