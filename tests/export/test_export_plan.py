"""ddpm-export --tensorrt: what is refused before the export, and plans by TensorRT-RTX for real."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import ddpm_export.pipeline
import ddpm_export.plan
from ddpm_runtime.bundle import read_bundle, write_bundle
from ddpm_runtime.errors import BackendUnavailableError
from ddpm_runtime.plans import Gpu, PlanCache
from ddpm_runtime.plans.sealed import read_header


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_PLAN_CACHE", str(tmp_path / "plans"))


@pytest.fixture
def rtx():
    """TensorRT-RTX, which builds without a GPU."""
    return pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install 'ddpm-engine[rtx]'"
    )


@pytest.fixture
def engine(bundle, tmp_path):
    write_bundle(tmp_path / "tiny.engine", bundle.manifest, bundle.network_bytes)
    return tmp_path / "tiny.engine"


@pytest.fixture
def no_work(monkeypatch):
    """Whoever starts the export fails the test."""

    def begun(*_, **__):
        raise AssertionError("the export was begun")

    monkeypatch.setattr(ddpm_export.pipeline, "network_from_path", begun)


def with_gpu(monkeypatch, sm):
    """A machine with a GPU of a compute capability."""

    class Device:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(ddpm_export.plan, "open_device", Device)
    gpu = Gpu(name="NVIDIA Test", sm=sm, cuda="13.0")
    monkeypatch.setattr(ddpm_export.plan, "Gpu", SimpleNamespace(of=lambda _device: gpu))


def without_gpu(monkeypatch):
    def none():
        raise BackendUnavailableError("no GPU is visible.")

    monkeypatch.setattr(ddpm_export.plan, "open_device", none)


# --- refused before the export begins ------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--sm", "89"], ["--sm", "89", "--sm", "86"], ["--capacity", "64"], ["--library", "tensorrt"]],
)
def test_a_plan_s_option_without_tensorrt_exits_2_and_names_both(
    command, checkpoint_path, no_work, arguments
):
    code, _, err = command(checkpoint_path, *arguments)
    assert code == 2
    assert f"{arguments[0]} says how a plan is built; add --tensorrt" in err


def test_without_a_gpu_and_without_sm_the_error_names_sm(
    command, checkpoint_path, no_work, monkeypatch
):
    without_gpu(monkeypatch)
    code, _, err = command(checkpoint_path, "--tensorrt")
    assert code == 1
    assert "no GPU is visible." in err
    assert "--sm 89" in err
    assert "ddpm-engine[rtx]" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sm", "89", "--library", "tensorrt"], "tensorrt is needed to build"),
        (["--sm", "89"], "tensorrt_rtx is needed to build"),
    ],
)
def test_a_library_that_is_missing_exits_1_with_the_pip_line(
    command, checkpoint_path, no_work, monkeypatch, arguments, said
):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    code, _, err = command(checkpoint_path, "--tensorrt", *arguments)
    assert code == 1
    assert said in err
    assert "pip install 'ddpm-engine[" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sm", "90"], "cannot build for compute capability 9.0; possible --sm:"),
        (["--sm", "-89"], "possible --sm:"),
        (["--sm", "89", "--sm", "77"], "cannot build for compute capability 7.7"),
        (["--sm", "75", "--precision", "bf16"], "has no bfloat16; export with --precision fp16"),
        (["--sm", "8.9"], "not a valid integer"),
        (["--sm", "89", "--capacity", "0"], "--capacity"),
        (["--sm", "89", "--library", "magic"], "tensorrt_rtx"),
    ],
)
def test_a_plan_that_cannot_be_built_exits_2_before_the_export(
    command, checkpoint_path, no_work, rtx, arguments, said
):
    code, _, err = command(checkpoint_path, "--tensorrt", *arguments)
    assert code == 2
    assert said in err
    assert {entry.name for entry in checkpoint_path.parent.iterdir()} == {"model.pt"}


def test_a_gpu_that_rtx_does_not_know_exits_2_before_the_export(
    command, checkpoint_path, no_work, rtx, monkeypatch
):
    with_gpu(monkeypatch, sm=90)
    code, _, err = command(checkpoint_path, "--tensorrt", "--library", "tensorrt_rtx")
    assert code == 2
    assert "cannot build for compute capability 9.0" in err


@pytest.mark.parametrize("arguments", [[], ["--force"]])
def test_a_file_that_is_there_is_replaced_only_with_force_and_only_if_it_is_a_plan(
    command, checkpoint_path, no_work, arguments
):
    thesis = checkpoint_path.with_name("model.sm89.plan")
    thesis.write_text("years of work")
    code, _, err = command(checkpoint_path, "--tensorrt", "--sm", 89, *arguments)
    assert code == 2
    assert ("--force does not replace it" if arguments else "give --force") in err
    assert thesis.read_text() == "years of work"


def test_a_plan_cache_open_to_others_exits_2_before_the_export(
    command, checkpoint_path, no_work, rtx, tmp_path
):
    (tmp_path / "plans").mkdir(mode=0o755)
    (tmp_path / "plans").chmod(0o755)
    code, _, err = command(checkpoint_path, "--tensorrt", "--sm", 89)
    assert code == 2
    assert "chmod 700" in err


@pytest.mark.parametrize(
    ("option", "value"), [("--output", "x.engine"), ("--name", "x"), ("--threads", 1)]
)
def test_what_writes_an_engine_means_nothing_for_a_plan_alone(command, engine, option, value):
    code, _, err = command(engine, "--tensorrt", "--sm", 89, option, value)
    assert code == 2
    assert f"{option} is for writing an engine; add --precision" in err


def test_an_engine_that_is_damaged_gets_no_plan(command, engine):
    (engine / "network.onnx").write_bytes(b"cut")
    code, _, err = command(engine, "--tensorrt", "--sm", 89)
    assert code == 1
    assert "truncated" in err


# --- built for real ------------------------------------------------------------------------------


def test_a_checkpoint_becomes_an_engine_and_a_plan(command, checkpoint_path, rtx, tmp_path):
    arguments = (checkpoint_path, "--tensorrt", "--sm", 89, "--capacity", 3, "--threads", 1)
    code, out, err = command(*arguments)
    assert code == 0, err
    engine = read_bundle(checkpoint_path.with_suffix(".engine"))
    path = checkpoint_path.with_name("model.sm89.plan")
    header = read_header(path, PlanCache(tmp_path / "plans").secret)
    assert header.ours
    assert (header.kind, header.label) == ("plan", "garments")
    key = header.key
    assert (key.compute_capability, key.buckets, key.precision) == ("8.9", "1,2,3", "fp32")
    assert (key.library, key.gpu) == ("tensorrt_rtx", "any")
    assert key.network_sha256 == engine.manifest.files["network.onnx"].sha256
    assert "building a plan for garments" in err
    assert "building" not in out
    assert out.splitlines()[-2].startswith(f"{checkpoint_path.with_suffix('.engine')}: ")
    assert out.splitlines()[-1].startswith(f"{path}: ")
    assert command(*arguments)[0] == 2  # both are there
    assert command(*arguments, "--force")[0] == 0


def test_a_lowered_engine_gets_a_plan_in_its_precision_for_each_sm(
    command, checkpoint_path, rtx, tmp_path
):
    code, _, err = command(
        checkpoint_path, "-o", tmp_path / "low.engine", "--precision", "bf16", "--tensorrt",
        "--sm", 120, "--sm", 86, "--sm", 86, "--capacity", 1, "--threads", 1,
    )  # fmt: skip
    assert code == 0, err
    key = read_header(tmp_path / "low.sm86-sm120.plan", b"").key
    assert (key.precision, key.compute_capability) == ("bf16", "8.6,12.0")


def test_an_engine_gets_a_plan_and_stays_as_it_is(command, engine, rtx, tmp_path):
    before = {file.name: file.read_bytes() for file in engine.iterdir()}
    code, out, err = command(engine, "--tensorrt", "--sm", 89, "--capacity", 1)
    assert code == 0, err
    assert {file.name: file.read_bytes() for file in engine.iterdir()} == before
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(tmp_path / "tiny.sm89.plan")]


def test_an_engine_is_lowered_and_planned_in_one_go(command, engine, rtx, tmp_path):
    code, _, err = command(
        engine, "--precision", "fp16", "--tensorrt", "--sm", 89, "--capacity", 1, "--threads", 1
    )
    assert code == 0, err
    assert read_header(tmp_path / "tiny.fp16.sm89.plan", b"").key.precision == "fp16"


def test_the_plan_of_an_engine_needs_neither_pytorch_nor_onnx(engine, rtx, tmp_path):
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "onnxruntime", "ml_dtypes"):
            raise ImportError(f"No module named {name}", name=name)
sys.meta_path.insert(0, Block())
from ddpm_export.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, engine, "--tensorrt", "--sm", "89", "--capacity", "1"],
        capture_output=True, text=True, timeout=120, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny.sm89.plan").is_file()


def test_a_gpu_of_this_machine_names_the_plan_after_the_engine_alone(
    command, engine, rtx, tmp_path, monkeypatch
):
    with_gpu(monkeypatch, sm=89)
    code, _, err = command(engine, "--tensorrt", "--library", "tensorrt_rtx", "--capacity", 1)
    assert code == 0, err
    assert read_header(tmp_path / "tiny.plan", b"").key.compute_capability == "8.9"


def test_a_plan_that_fails_leaves_the_engine_and_says_so(
    command, checkpoint_path, rtx, monkeypatch
):
    def refuse(*_, **__):
        raise ddpm_export.plan.DamagedPlanError("the builder gave up")

    monkeypatch.setattr(ddpm_export.plan, "plan_from_cache", refuse)
    code, out, err = command(checkpoint_path, "--tensorrt", "--sm", 89, "--threads", 1)
    assert code == 1
    assert err.splitlines()[-1] == "error: the builder gave up"
    assert out.splitlines()[-1].startswith(f"{checkpoint_path.with_suffix('.engine')}: ")
    read_bundle(checkpoint_path.with_suffix(".engine"))
    assert not checkpoint_path.with_name("model.sm89.plan").exists()
