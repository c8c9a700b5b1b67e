"""ddpm-export as a person meets it: its table, its messages, its exit codes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
import torch

import ddpm_export.pipeline
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import ParityError


def ddpm_export_process(*arguments, **settings) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ddpm_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **settings,
    )


def test_the_whole_command_makes_the_engine_that_another_process_makes(
    checkpoint_path, network_bytes, tmp_path
):
    done = ddpm_export_process(
        checkpoint_path, "--threads", 1, cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": "1"}
    )
    assert done.returncode == 0, done.stderr
    engine = checkpoint_path.with_suffix(".engine")
    bundle = read_bundle(engine)
    assert bundle.manifest.parity["passed"] is True
    assert bundle.network_bytes == network_bytes  # made in this process
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["timestep", "relative", "error"]
    assert lines[-2] == "parity: passed"
    assert lines[-1].startswith(f"{engine}: ")
    assert "comparing with PyTorch" in done.stderr
    assert "Warning" not in done.stderr
    assert "torchvision" not in done.stderr


def test_options_become_the_engine_s_defaults(command, checkpoint_path, tmp_path):
    code, out, _ = command(
        checkpoint_path, "-o", tmp_path / "x.engine", "--name", "garments", "--steps", 25,
        "--spacing", "trailing", "--guidance-scale", 2.5, "--sampler", "ddpm", "--threads", 1,
    )  # fmt: skip
    assert code == 0
    manifest = read_bundle(tmp_path / "x.engine").manifest
    assert manifest.name == "garments"
    defaults = manifest.defaults
    assert (defaults.sampler, defaults.steps, defaults.spacing) == ("ddpm", 25, "trailing")
    assert defaults.guidance_scale == 2.5
    assert str(tmp_path / "x.engine") in out


def test_a_failed_gate_exits_1_with_the_worst_timestep(command, checkpoint_path, tmp_path):
    code, _, err = command(
        checkpoint_path, "-o", tmp_path / "x.engine", "--tolerance", 1e-9, "--threads", 1
    )
    assert code == 1
    assert "relative error" in err
    assert "at timestep" in err
    assert "Nothing was written" in err
    assert "Traceback" not in err
    assert not (tmp_path / "x.engine").exists()


def test_an_output_that_exists_exits_2_and_names_the_flag(command, checkpoint_path, tmp_path):
    assert command(checkpoint_path, "-o", tmp_path / "x.engine", "--threads", 1)[0] == 0
    code, _, err = command(checkpoint_path, "-o", tmp_path / "x.engine")
    assert code == 2
    assert "--force" in err
    assert command(checkpoint_path, "-o", tmp_path / "x.engine", "--force", "--threads", 1)[0] == 0


def test_an_unwritable_output_exits_1(command, checkpoint_path):
    code, _, err = command(checkpoint_path, "-o", "/proc/x.engine")
    assert code == 1
    assert "/proc" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "CHECKPOINT"),
        (["model.pt", "--nonsense"], "--nonsense"),
        (["model.pt", "--steps", "many"], "--steps"),
        (["model.pt", "--sampler", "magic"], "ddim"),
        (["model.pt", "--threads", "0"], "--threads"),
    ],
)
def test_a_wrong_command_exits_2(command, arguments, said):
    code, _, err = command(*arguments)
    assert code == 2
    assert said in err


def test_a_missing_checkpoint_exits_1(command, tmp_path):
    code, _, err = command(tmp_path / "none.pt")
    assert code == 1
    assert "no such file" in err


class Hostile:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".ckpt", ".engine"])
@pytest.mark.parametrize("writer", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_wants_to_run_code_runs_none(command, tmp_path, suffix, writer):
    path = tmp_path / f"model{suffix}"
    writer({"format": "ddpm-engine checkpoint", "state_dict": Hostile(tmp_path / "canary")}, path)
    code, _, err = command(path, "-o", tmp_path / "x.engine")
    assert code == 1
    assert "error:" in err
    assert "Traceback" not in err
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name}


def test_the_canary_of_that_test_would_appear(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("library", ["torch", "onnx", "onnxscript", "onnxruntime", "safetensors"])
def test_a_missing_extra_exits_1_with_the_pip_line(library, tmp_path):
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {library!r}:
            raise ImportError(f"No module named {{name}}", name=name)
sys.meta_path.insert(0, Block())
from ddpm_export.__main__ import main
assert "torch" not in sys.modules
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pt")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {library} is needed")
    assert "pip install 'ddpm-engine[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_exits_130_and_writes_nothing(command, checkpoint_path, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm_export.pipeline, "measure_parity", interrupted)
    code, _, err = command(checkpoint_path, "-o", tmp_path / "x.engine")
    assert code == 130
    assert "interrupted" in err
    assert not (tmp_path / "x.engine").exists()


def test_parity_errors_are_one_line(command, checkpoint_path, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ParityError("the exported network does not agree")

    monkeypatch.setattr(ddpm_export.pipeline, "measure_parity", refuse)
    code, _, err = command(checkpoint_path, "-o", tmp_path / "x.engine")
    assert code == 1
    assert err.splitlines()[-1] == "error: the exported network does not agree"
