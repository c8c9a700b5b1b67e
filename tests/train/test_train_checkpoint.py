"""Checkpoints: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny_training import TINY_NETWORK, same_bits

from ddpm_runtime.errors import CheckpointError
from ddpm_train.checkpoint import (
    FORMAT_VERSION,
    load_checkpoint,
    network_from_checkpoint,
    read_state,
    save_checkpoint,
    write_state,
)
from ddpm_train.unet import UNet

SPEC = {"name": "linear", "num_train_timesteps": 50}


def tiny_network(seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    network = UNet(TINY_NETWORK)
    for parameter in network.parameters():  # layers that start at zero would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def write(path: Path, network: UNet | None = None, **changes) -> Path:
    network = network or tiny_network()
    settings = {"schedule_spec": SPEC, "prediction_type": "v_prediction", "step": 7}
    save_checkpoint(path, network.config, network.state_dict(), **{**settings, **changes})
    return path


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_was_saved_is_what_is_loaded(tmp_path, suffix):
    network = tiny_network()
    names = ("shirt", "coat", "bag")
    provenance = {"made_by": "a test", "recipe": {"sizes": (1, 2)}}
    path = write(tmp_path / f"model{suffix}", network, class_names=names, provenance=provenance)
    checkpoint = load_checkpoint(path)
    assert same_bits(checkpoint.state_dict, network.state_dict())
    assert checkpoint.network_config == TINY_NETWORK
    assert checkpoint.schedule_spec == SPEC
    assert checkpoint.prediction_type == "v_prediction"
    assert checkpoint.learned_variance is False
    assert (checkpoint.image_size, checkpoint.image_channels) == (8, 1)
    assert checkpoint.value_range == (-1.0, 1.0)
    assert (checkpoint.num_classes, checkpoint.class_names, checkpoint.step) == (3, names, 7)
    assert checkpoint.provenance == {"made_by": "a test", "recipe": {"sizes": [1, 2]}}


def test_the_network_of_a_checkpoint_is_in_eval_mode_and_answers_as_the_original(tmp_path):
    network = tiny_network().eval()
    loaded = network_from_checkpoint(load_checkpoint(write(tmp_path / "model.pt", network)))
    assert not loaded.training
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([0.0, 49.0]), torch.tensor([1, 3])
    with torch.no_grad():
        assert torch.equal(network(*inputs), loaded(*inputs))


def test_weights_of_another_network_are_refused(tmp_path):
    network = tiny_network()
    weights = dict(network.state_dict())
    del weights["conv_in.bias"]
    save_checkpoint(
        tmp_path / "model.pt", TINY_NETWORK, weights, schedule_spec=SPEC, prediction_type="epsilon"
    )
    with pytest.raises(CheckpointError, match=r"conv_in\.bias"):
        network_from_checkpoint(load_checkpoint(tmp_path / "model.pt"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name_and_the_old_file_stays(tmp_path, value):
    path = write(tmp_path / "model.pt")
    before = path.read_bytes()
    broken = tiny_network()
    with torch.no_grad():
        broken.conv_out.bias[0] = value
    with pytest.raises(CheckpointError, match=r"conv_out\.bias.*1 NaN or infinite"):
        write(path, broken)
    assert path.read_bytes() == before


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_with_nan_weights_is_refused_by_name(tmp_path, suffix, monkeypatch):
    broken = tiny_network()
    with torch.no_grad():
        broken.conv_in.weight[0] = float("nan")
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_train.checkpoint._check_finite", lambda *_: None)
        path = write(tmp_path / f"model{suffix}", broken)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        load_checkpoint(path)


# --- files that are not what they should be ------------------------------------------------------


class Hostile:
    """Touches a file when unpickled, if anything lets it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def as_plain_pickle(payload, path):
    path.write_bytes(pickle.dumps({"state_dict": payload}))


def as_torch_file(payload, path):
    torch.save({"format": "ddpm-engine checkpoint", "state_dict": payload}, path)


def as_old_torch_file(payload, path):
    torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)


def inside_a_real_checkpoint(payload, path):
    """Swap the pickle of a valid file, keeping everything else of the archive."""
    write(path)
    inner = io.BytesIO()
    pickle.Pickler(inner, protocol=2).dump({"format": "ddpm-engine checkpoint", "x": payload})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, inner.getvalue() if name.endswith("data.pkl") else content)


@pytest.mark.parametrize(
    "disguise", [as_plain_pickle, as_torch_file, as_old_torch_file, inside_a_real_checkpoint]
)
def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_none(tmp_path, disguise):
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    disguise(Hostile(canary), path)
    with pytest.raises(CheckpointError, match="run code"):
        load_checkpoint(path)
    assert not canary.exists()


def test_the_canary_would_sing_if_it_were_let(tmp_path):
    """The test above means something only if the payload works."""
    canary = tmp_path / "canary"
    pickle.loads(pickle.dumps(Hostile(canary)))
    assert canary.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 not a zip", b"\0" * 5000])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="model"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint_is_refused_wherever_it_was_cut(tmp_path, suffix):
    path = write(tmp_path / f"model{suffix}")
    content = path.read_bytes()
    for part in range(1, 20):
        path.write_bytes(content[: len(content) * part // 20])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


@pytest.mark.parametrize("name", ["missing.pt", "missing.safetensors"])
def test_a_missing_checkpoint_is_said_to_be_missing(tmp_path, name):
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / name)


def test_a_folder_is_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)


def test_a_bare_state_dict_is_not_a_checkpoint(tmp_path):
    torch.save(tiny_network().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt"):
        load_checkpoint(tmp_path / "weights.pt")


def test_a_resume_state_is_not_a_checkpoint(tmp_path):
    state = {"format": "ddpm-engine resume state", "format_version": 1}
    write_state(tmp_path / "resume.pt", state)
    with pytest.raises(CheckpointError, match="resume state"):
        load_checkpoint(tmp_path / "resume.pt")


def test_a_checkpoint_from_the_future_names_the_upgrade(tmp_path):
    path = write(tmp_path / "model.pt")
    values = read_state(path, "ddpm-engine checkpoint")
    write_state(path, {**values, "format_version": FORMAT_VERSION + 1})
    with pytest.raises(CheckpointError, match="pip install -U"):
        load_checkpoint(path)


@pytest.mark.parametrize("entry", ["network", "diffusion", "image", "state_dict", "class_names"])
def test_an_incomplete_checkpoint_names_what_is_missing(tmp_path, entry):
    path = write(tmp_path / "model.pt")
    values = read_state(path, "ddpm-engine checkpoint")
    del values[entry]
    write_state(path, values)
    with pytest.raises(CheckpointError, match=entry):
        load_checkpoint(path)


def test_safetensors_without_the_metadata_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(tiny_network().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="metadata"):
        load_checkpoint(tmp_path / "model.safetensors")


# --- killed while writing ------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
import torch
from ddpm_train.checkpoint import load_checkpoint, save_checkpoint
from ddpm_train.unet import UNetConfig

torch.set_num_threads(1)  # a pool of threads does not survive a fork
path, kills = sys.argv[1], int(sys.argv[2])
config = UNetConfig(image_size=8, image_channels=1)

def save(number):
    weights = {f"part {i}": torch.full((50_000,), float(number)) for i in range(4)}
    save_checkpoint(path, config, weights, schedule_spec={}, prediction_type="epsilon", step=number)

save(0)
random.seed(0)
newest = 0
for _ in range(kills):
    child = os.fork()
    if child == 0:
        number = newest
        while True:
            number += 1
            save(number)
    time.sleep(random.uniform(0.0, 0.1))  # a write takes 10 ms, or 100 on a busy machine
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checkpoint = load_checkpoint(path)
    found = {float(v) for part in checkpoint.state_dict.values() for v in part.unique()}
    assert found == {float(checkpoint.step)}, (found, checkpoint.step)
    assert checkpoint.step >= newest
    newest = checkpoint.step
save(newest + 1)
print(newest, len(os.listdir(os.path.dirname(path))))
"""


def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_checkpoint(tmp_path):
    path = tmp_path / "model.pt"
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(path), "50"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    written, files = map(int, done.stdout.split())
    assert written > 0  # some writes ended before the kill came
    assert files == 1  # what killed writers left was swept away by the next
