"""ddpm_runtime/bundle.py: what is read is what was written, and everything else is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest

from ddpm_runtime import Engine
from ddpm_runtime.backends import ort
from ddpm_runtime.bundle import FORMAT_VERSION, read_bundle, write_bundle
from ddpm_runtime.errors import (
    BackendError,
    BundleError,
    IntegrityError,
    ManifestError,
    NetworkMismatchError,
    NotABundleError,
)
from helpers.tiny_engine import tiny_network_bytes


@pytest.fixture
def bundle_path(tiny_engine_path, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_engine_path, tmp_path / "copy.engine"))


def edit_manifest(path: Path, change) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_bundle_reads_back_as_it_was_written(bundle_path):
    bundle = read_bundle(bundle_path)
    assert bundle.network_bytes == tiny_network_bytes()
    assert bundle.manifest.network.class_names == ("circle", "square", "star")
    assert bundle.schedule.num_train_timesteps == 100
    again = bundle_path.with_name("again.engine")
    write_bundle(again, bundle.manifest, bundle.network_bytes)
    assert read_bundle(again).manifest == bundle.manifest


def test_a_bundle_is_two_files_and_replaces_an_older_one_whole(bundle_path):
    bundle = read_bundle(bundle_path)
    renamed = msgspec.structs.replace(bundle.manifest, name="second")
    (bundle_path / "stale.txt").write_text("left over")
    write_bundle(bundle_path, renamed, bundle.network_bytes)
    assert {file.name for file in bundle_path.iterdir()} == {"manifest.json", "network.onnx"}
    assert read_bundle(bundle_path).manifest.name == "second"
    assert [entry.name for entry in bundle_path.parent.iterdir()] == ["copy.engine"]


def set_field(*keys, value):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


HOSTILE_FIELDS = {
    "unknown field": set_field("surprise", value=1),
    "unknown nested field": set_field("image", "depth", value=1),
    "wrong format": set_field("format", value="zip"),
    "wrong type": set_field("image", "height", value="28"),
    "no height": set_field("image", "height", value=0),
    "gigantic height": set_field("image", "height", value=2**62),
    "number beyond 64 bits": set_field("image", "height", value=2**80),
    "negative classes": set_field("network", "num_classes", value=-1),
    "classes without names": set_field("network", "num_classes", value=4),
    "unknown prediction": set_field("network", "prediction_type", value="score"),
    "unknown schedule": set_field("schedule", "name", value="quartic"),
    "unknown schedule option": set_field("schedule", "gamma", value=1),
    "schedule of the wrong type": set_field("schedule", "beta_end", value="big"),
    "impossible betas": set_field("schedule", "beta_end", value=3.0),
    "gigantic schedule": set_field("schedule", "num_train_timesteps", value=10**12),
    "schedule without T": set_field("schedule", value={"name": "linear"}),
    "no steps": set_field("defaults", "steps", value=0),
    "other value range": set_field("image", "value_range", value=[0, 1]),
    "path in a file name": set_field("files", "../network.onnx", value={}),
    "absolute file name": set_field("files", "/etc/passwd", value={"size_bytes": 1, "sha256": "0"}),
    "no network": set_field("files", value={}),
}


@pytest.mark.parametrize("kind", HOSTILE_FIELDS)
def test_a_hostile_manifest_is_refused_before_any_native_call(bundle_path, monkeypatch, kind):
    calls = []
    monkeypatch.setattr(ort, "open_ort", lambda *a, **k: calls.append(a))
    edit_manifest(bundle_path, HOSTILE_FIELDS[kind])
    with pytest.raises(ManifestError):
        Engine.load(bundle_path)
    assert not calls


HOSTILE_TEXT = {
    "empty": b"",
    "not JSON": b"\x80\x04pickle",
    "a list": b"[]",
    "deep nesting": b'{"format":' + b"[" * 100_000,
    "NaN": b'{"format":"ddpm-engine","format_version":NaN}',
    "duplicate keys": b'{"format":"zip","format":"ddpm-engine","format_version":1}',
    "bad UTF-8": b'{"format":"\xff"}',
    "longer than a megabyte": b" " * (1 << 20) + b"{}",
}


@pytest.mark.parametrize("kind", HOSTILE_TEXT)
def test_a_manifest_that_is_no_manifest_is_refused(bundle_path, kind):
    (bundle_path / "manifest.json").write_bytes(HOSTILE_TEXT[kind])
    with pytest.raises((ManifestError, IntegrityError)):
        read_bundle(bundle_path)


def test_a_manifest_from_the_future_says_to_upgrade(bundle_path):
    def future(manifest):
        manifest["format_version"] = FORMAT_VERSION + 1
        manifest["a_field_nobody_knows_yet"] = True

    edit_manifest(bundle_path, future)
    with pytest.raises(ManifestError, match="pip install -U ddpm-engine"):
        read_bundle(bundle_path)


def test_what_is_not_a_bundle_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "missing", Path(__file__)):
        with pytest.raises(NotABundleError, match="ddpm-export"):
            read_bundle(path)


def test_every_truncation_of_the_network_is_refused(bundle_path):
    network = bundle_path / "network.onnx"
    whole = network.read_bytes()
    for length in range(len(whole)):
        network.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="truncated"):
            read_bundle(bundle_path)


def test_every_flipped_bit_of_the_network_is_refused(bundle_path):
    network = bundle_path / "network.onnx"
    whole = network.read_bytes()
    for bit in range(0, 8 * len(whole), 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << (bit % 8)
        network.write_bytes(flipped)
        with pytest.raises(IntegrityError, match="SHA-256"):
            read_bundle(bundle_path)


def test_a_network_that_is_longer_than_the_manifest_says_is_refused(bundle_path):
    with open(bundle_path / "network.onnx", "ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError, match="more than"):
        read_bundle(bundle_path)


@pytest.mark.parametrize("kind", ["missing", "symbolic link", "pipe", "folder"])
def test_a_network_that_is_no_regular_file_is_refused(bundle_path, tmp_path, kind):
    network = bundle_path / "network.onnx"
    network.rename(tmp_path / "elsewhere.onnx")
    if kind == "symbolic link":
        network.symlink_to(tmp_path / "elsewhere.onnx")
    elif kind == "pipe":
        os.mkfifo(network)
    elif kind == "folder":
        network.mkdir()
    with pytest.raises(IntegrityError):
        read_bundle(bundle_path)


def test_a_network_that_is_no_onnx_is_a_backend_error(bundle_path):
    bundle = read_bundle(bundle_path)
    write_bundle(bundle_path, bundle.manifest, b"not a protobuf at all")
    with pytest.raises(BackendError, match="Export the checkpoint again"):
        Engine.load(bundle_path)


@pytest.mark.parametrize(
    "other", [{"size": 10}, {"channels": 3}, {"num_classes": 0}], ids=["size", "channels", "label"]
)
def test_a_network_of_another_signature_is_a_mismatch(bundle_path, other):
    bundle = read_bundle(bundle_path)
    write_bundle(bundle_path, bundle.manifest, tiny_network_bytes(**other))
    with pytest.raises(NetworkMismatchError, match="manifest describes"):
        Engine.load(bundle_path)


def test_a_bundle_that_contradicts_itself_is_not_written(tiny_engine_path, tmp_path):
    bundle = read_bundle(tiny_engine_path)
    wrong = msgspec.structs.replace(bundle.manifest, schedule={"name": "linear"})
    with pytest.raises(BundleError):
        write_bundle(tmp_path / "new.engine", wrong, bundle.network_bytes)
    assert not list(tmp_path.iterdir())
