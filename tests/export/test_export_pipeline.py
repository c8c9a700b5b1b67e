"""From a checkpoint to a bundle: all of it, or none of it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_export import SPEC, redrawn_network, save

import ddpm_export.pipeline
from ddpm_export.destination import default_output
from ddpm_export.onnx_graph import onnx_from_network
from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint
from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import CheckpointError, ConfigurationError, ParityError
from ddpm_train.unet import UNetConfig

ONE_THREAD = ExportOptions(threads=1)


@pytest.fixture(autouse=True)
def _cached_export(monkeypatch, network, network_bytes):
    """The tiny network is exported once; any other is exported anew."""
    weights = network.state_dict()

    def export(other, image, *, num_classes):
        same = {
            name: value.shape == weights[name].shape and torch.equal(value, weights[name])
            for name, value in other.state_dict().items()
            if name in weights
        }
        if same.keys() == weights.keys() and all(same.values()):
            assert not any(module.training for module in other.modules())
            return network_bytes
        return onnx_from_network(other, image, num_classes=num_classes)

    monkeypatch.setattr(ddpm_export.pipeline, "onnx_from_network", export)


def export(path, output=None, **options):
    return bundle_from_checkpoint(path, output, options=ONE_THREAD, **options)


def names_in(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_the_bundle_holds_what_the_checkpoint_said(network, tmp_path, network_bytes):
    path = save(
        network, tmp_path / "run" / "model.pt", class_names=("a", "b", "c"), step=42,
        prediction_type="v_prediction", provenance={"seed": 3, "recipe": {"data": [1, 2]}},
    )  # fmt: skip
    report = export(path)
    bundle = read_bundle(tmp_path / "run" / "model.engine")
    manifest = bundle.manifest
    assert bundle.network_bytes == network_bytes
    assert manifest.name == "run"  # "model" says nothing
    assert (manifest.image.height, manifest.image.width, manifest.image.channels) == (8, 8, 1)
    assert manifest.network.prediction_type == "v_prediction"
    assert manifest.network.num_classes == 3
    assert manifest.network.class_names == ("a", "b", "c")
    assert manifest.schedule == SPEC
    assert (manifest.defaults.sampler, manifest.defaults.steps) == ("ddim", 50)
    assert manifest.parity == report.parity.to_dict()
    assert report.precision is None
    provenance = manifest.provenance
    assert provenance["checkpoint_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert provenance["training.step"] == "42"
    assert provenance["training.seed"] == "3"
    assert json.loads(provenance["training.recipe"]) == {"data": [1, 2]}
    assert {"torch", "onnx", "onnxscript", "onnxruntime", "made_by"} <= provenance.keys()


def test_no_path_of_this_machine_is_in_the_manifest(checkpoint_path, tmp_path):
    export(checkpoint_path, tmp_path / "x.engine")
    text = (tmp_path / "x.engine" / "manifest.json").read_text()
    for private in (str(tmp_path), os.getcwd(), str(Path.home()) + "/", sys.prefix):
        assert private not in text


def test_the_same_checkpoint_gives_the_same_bundle_byte_for_byte(checkpoint_path, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        export(checkpoint_path, tmp_path / name / "x.engine")
    for file in ("network.onnx", "manifest.json"):
        first, second = (tmp_path / name / "x.engine" / file for name in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()


def test_safetensors_gives_the_same_network(network, checkpoint_path, tmp_path):
    export(checkpoint_path, tmp_path / "a.engine")
    export(save(network, tmp_path / "model.safetensors"), tmp_path / "b.engine")
    networks = [read_bundle(tmp_path / name).network_bytes for name in ("a.engine", "b.engine")]
    assert networks[0] == networks[1]


def test_the_engine_samples_what_pytorch_samples(network, checkpoint_path, tmp_path):
    """DDIM (Song et al. eq. 12, η = 0) written out here, on the engine's own x_T."""
    export(checkpoint_path, tmp_path / "x.engine")
    with Engine.load(tmp_path / "x.engine", threads=1) as engine:
        images = engine.sample(2, seed=5, steps=10, label=[0, 2], output="float32")
    alphas_cumprod = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 200))
    x = torch.tensor(np.stack([x_T(5, index) for index in range(2)]))
    double = redrawn_network(network.config).double()
    for t in range(180, -1, -20):
        now, after = alphas_cumprod[t], alphas_cumprod[t - 20] if t else 1.0
        with torch.no_grad():
            epsilon = double(x, torch.full((2,), float(t)), torch.tensor([0, 2]))
        x_0 = ((x - (1 - now) ** 0.5 * epsilon) / now**0.5).clamp(-1, 1)
        epsilon = (x - now**0.5 * x_0) / (1 - now) ** 0.5
        x = after**0.5 * x_0 + (1 - after) ** 0.5 * epsilon
    assert np.abs(images - x.numpy()).max() < 1e-3


def x_T(seed, index):
    from ddpm_runtime.noise import noise

    return noise(seed, index, 0, 64).reshape(1, 8, 8).astype(np.float64)


def test_a_colour_network_without_classes_is_exported_for_real(tmp_path):
    config = UNetConfig(
        image_size=4, image_channels=3, channels=4, channel_multipliers=(1,), residual_blocks=1,
        attention_resolutions=(), norm_groups=2,
    )  # fmt: skip
    path = save(redrawn_network(config), tmp_path / "colour.pt")
    report = export(path)
    assert report.parity.labels == ()
    with Engine.load(tmp_path / "colour.engine", threads=1) as engine:
        assert engine.sample(2, steps=3).shape == (2, 4, 4, 3)


# --- refusals: nothing written -------------------------------------------------------------------


def test_a_network_that_fails_the_gate_writes_nothing(checkpoint_path, monkeypatch, network_bytes):
    def other_weights(network, image, *, num_classes):
        with torch.no_grad():
            network.conv_out.bias += 0.01  # PyTorch now differs from the bytes
        return network_bytes

    monkeypatch.setattr(ddpm_export.pipeline, "onnx_from_network", other_weights)
    with pytest.raises(ParityError, match=r"at timestep .* Nothing was written"):
        export(checkpoint_path)
    assert names_in(checkpoint_path.parent) == {"model.pt"}


def test_an_engine_that_is_there_survives_a_failed_export(checkpoint_path, tmp_path):
    output = tmp_path / "x.engine"
    export(checkpoint_path, output)
    before = (output / "manifest.json").read_bytes()
    impossible = ExportOptions(threads=1, tolerance=1e-12)
    with pytest.raises(ParityError, match="1e-12 is allowed"):
        bundle_from_checkpoint(checkpoint_path, output, force=True, options=impossible)
    assert (output / "manifest.json").read_bytes() == before
    assert names_in(tmp_path) == {"x.engine", "garments"}


def test_an_engine_is_replaced_only_with_force(network, checkpoint_path, tmp_path):
    output = tmp_path / "x.engine"
    export(checkpoint_path, output)
    other = save(network, tmp_path / "other.pt", step=99)
    with pytest.raises(ConfigurationError, match=r"x\.engine' exists; give --force"):
        export(other, output)
    assert read_bundle(output).manifest.provenance["training.step"] == "7"
    export(other, output, force=True)
    assert read_bundle(output).manifest.provenance["training.step"] == "99"


def test_a_damaged_engine_may_be_replaced(checkpoint_path, tmp_path):
    output = tmp_path / "x.engine"
    export(checkpoint_path, output)
    (output / "network.onnx").write_bytes(b"cut")
    export(checkpoint_path, output, force=True)
    read_bundle(output)


@pytest.mark.parametrize("kind", ["directory", "file", "link", "other manifest"])
def test_force_never_replaces_what_is_not_an_engine(checkpoint_path, tmp_path, kind):
    output = tmp_path / "thesis"
    if kind == "file":
        output.write_text("years of work")
    elif kind == "link":
        export(checkpoint_path, tmp_path / "real.engine")
        output.symlink_to(tmp_path / "real.engine")
    else:
        output.mkdir()
        (output / "chapter1").write_text("years of work")
        if kind == "other manifest":
            (output / "manifest.json").write_text('{"format": "web app", "format_version": 1}')
    with pytest.raises(ConfigurationError, match="not an engine, so --force does not replace it"):
        export(checkpoint_path, output, force=True)
    if kind != "link":
        assert "years of work" in (output if kind == "file" else output / "chapter1").read_text()


@pytest.mark.parametrize("place", ["missing/x.engine", "file/x.engine"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    checkpoint_path, tmp_path, place
):
    (tmp_path / "file").write_text("")
    said: list[str] = []
    with pytest.raises(OSError, match="is not a directory"):
        export(checkpoint_path, tmp_path / place, progress=said.append)
    assert said == []


def test_a_disk_that_fails_while_writing_leaves_nothing(checkpoint_path, tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export(checkpoint_path, tmp_path / "x.engine")
    assert names_in(tmp_path) == {"garments"}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 201}, "200"),
        ({"sampler": "ddimm"}, "Did you mean 'ddim'"),
        ({"spacing": "fancy"}, "spacing"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
    ],
)
def test_impossible_defaults_are_refused_before_the_export(
    checkpoint_path, tmp_path, options, match
):
    with pytest.raises(ConfigurationError, match=match):
        bundle_from_checkpoint(
            checkpoint_path, tmp_path / "x.engine", options=ExportOptions(**options)
        )
    assert names_in(tmp_path) == {"garments"}


def test_fewer_training_timesteps_than_the_sampler_recommends_lower_the_default(network, tmp_path):
    spec = {"name": "linear", "num_train_timesteps": 20, "beta_end": 0.3}
    export(save(network, tmp_path / "short.pt", schedule_spec=spec))
    assert read_bundle(tmp_path / "short.engine").manifest.defaults.steps == 20


# --- files that are not checkpoints --------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip_inside(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(200, len(content), 97):
        content[at] ^= 0x55
    path.write_bytes(bytes(content))


def bare_state_dict(path: Path) -> None:
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)


def from_the_future(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "format_version": 99}, path)


def impossible_schedule(path: Path) -> None:
    values = torch.load(path, weights_only=True)
    values["diffusion"]["schedule"]["beta_start"] = 2.0
    torch.save(values, path)


def unknown_schedule(path: Path) -> None:
    values = torch.load(path, weights_only=True)
    values["diffusion"]["schedule"]["name"] = "lineal"
    torch.save(values, path)


def nan_weight(path: Path) -> None:
    values = torch.load(path, weights_only=True)
    values["state_dict"]["conv_in.bias"][0] = float("nan")
    torch.save(values, path)


DAMAGES = {
    cut: "damaged",
    flip_inside: "damaged",
    bare_state_dict: "dict|state",
    from_the_future: "99",
    impossible_schedule: "beta",
    unknown_schedule: "linear",
    nan_weight: r"conv_in\.bias",
    lambda path: path.write_bytes(b""): "damaged",
    lambda path: path.write_text("hello"): "damaged",
    lambda path: path.unlink(): "no such file",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_no_usable_checkpoint_is_refused_and_nothing_written(
    checkpoint_path, damage
):
    damage(checkpoint_path)
    with pytest.raises(CheckpointError, match=DAMAGES[damage]):
        export(checkpoint_path)
    assert names_in(checkpoint_path.parent) <= {"model.pt"}


def test_an_engine_given_as_checkpoint_is_named_as_such(checkpoint_path, tmp_path):
    export(checkpoint_path, tmp_path / "x.engine")
    with pytest.raises(CheckpointError, match="give it to ddpm-run"):
        export(tmp_path / "x.engine", tmp_path / "y.engine")


def test_the_output_is_named_after_the_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "model.v2.pt").touch()
    (tmp_path / "folder.v2").mkdir()
    assert default_output(tmp_path / "model.v2.pt") == tmp_path / "model.v2.engine"
    assert default_output(tmp_path / "folder.v2") == tmp_path / "folder.v2.engine"
    monkeypatch.chdir(tmp_path / "folder.v2")
    assert default_output(Path(".")) == tmp_path / "folder.v2.engine"
    (tmp_path / "a.engine").mkdir()
    assert default_output(tmp_path / "model.v2.pt", "fp16") == tmp_path / "model.v2.fp16.engine"
    assert default_output(tmp_path / "a.engine", "bf16") == tmp_path / "a.bf16.engine"


# --- killed --------------------------------------------------------------------------------------

# The write stage of the pipeline, over and over, without the seconds that torch takes to import.
_WRITER = """
import sys
from ddpm_runtime.bundle import read_bundle, write_bundle
bundle = read_bundle(sys.argv[1])
print("ready", flush=True)
while True:
    write_bundle(sys.argv[2], bundle.manifest, bundle.network_bytes)
"""


def test_thirty_kills_while_writing_leave_no_torn_bundle(checkpoint_path, tmp_path):
    seed = tmp_path / "seed.engine"
    export(checkpoint_path, seed)
    output = tmp_path / "out" / "x.engine"
    output.parent.mkdir()
    delays = random.Random(0)
    for kill in range(30):
        if kill % 10 == 0:  # also the first write of all
            shutil.rmtree(output, ignore_errors=True)
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, seed, output], stdout=subprocess.PIPE
        )
        with writer:
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(delays.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
        if output.exists():
            assert read_bundle(output).network_bytes == read_bundle(seed).network_bytes
    export(checkpoint_path, output, force=output.exists())
    assert names_in(output.parent) == {"x.engine"}  # what the dead left is swept
