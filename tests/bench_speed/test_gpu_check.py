"""make gpu-check rehearsed: the script as it stands, every process of it on a simulated GPU."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
sys.path.append(str(Path(__file__).parents[1] / "plans"))
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from simulated_machine import host_kernels, processes

import gpu_check

ROOT = Path(__file__).parents[2]

SANITIZER = """#!/bin/sh
# Stands for compute-sanitizer: runs the program it is given.
echo "========= COMPUTE-SANITIZER $2"
shift 4
exec "$@"
"""


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The environment of a machine with a simulated GPU and a stand-in for compute-sanitizer."""
    folder = tmp_path_factory.mktemp("kernels")
    host_kernels(folder)
    tool = tmp_path_factory.mktemp("tools") / "compute-sanitizer"
    tool.write_text(SANITIZER)
    tool.chmod(0o755)
    made = processes(folder / "exact")
    return {**made, "PATH": f"{tool.parent}{os.pathsep}{made['PATH']}"}


def check(environment, folder, *words):
    """The script in a process of its own: its exit code, its report, its page."""
    paths = folder / "check.json", folder / "check.md"
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/gpu_check.py"),
            *("--json", paths[0], "--markdown", paths[1], *map(str, words)),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    report = json.loads(paths[0].read_text())
    return done.returncode, {one["name"]: one for one in report["phases"]}, paths[1].read_text()


def test_every_phase_runs_on_the_simulated_gpu_and_passes(gpu, tiny_engine_path, tmp_path):
    code, phases, page = check(
        gpu, tmp_path, "--engine", tiny_engine_path, "--batch-size", 2, "--rounds", 3,
        "--select", "noise or never_waits or (compiled_here and gpu)",
    )  # fmt: skip
    assert [one["outcome"] for one in phases.values()] == ["passed"] * 5, (phases, page)
    assert list(phases) == ["machine", "tests", "parity", "sanitizer", "benchmark"]
    assert phases["machine"]["found"]["name"] == "Simulated GPU"
    assert phases["tests"]["found"] == {"passed": 1, "failed": 0, "error": 0, "skipped": 0}
    # noise; no waiting, at three levels by the kernels alone and at two with each library
    assert phases["parity"]["found"]["passed"] == 1 + 3 + 2 * 2
    assert phases["parity"]["found"]["skipped"] == 2
    assert any("pip install 'ddpm-engine[rtx]'" in said for said in phases["parity"]["said"])
    assert phases["sanitizer"]["said"] == [
        "memcheck at L0: no error", "racecheck at L0: no error", "memcheck at L1: no error",
    ]  # fmt: skip
    cases = {case["id"] for case in phases["benchmark"]["found"]["report"]["cases"]}
    assert "gpu/tiny/batch-2/tensorrt-fp32-L2" in cases
    assert code == 0
    assert "all passed" in page
    assert "## tiny, batch 2" in page
    assert str(tmp_path) not in json.dumps(phases)


def test_without_a_gpu_every_phase_is_reported_and_the_check_fails(tmp_path, gpu):
    environment = {**gpu, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}
    code, phases, page = check(environment, tmp_path, "--select", "compiled_here or noise")
    assert code == 1
    assert list(phases) == list(gpu_check.PHASES)
    assert {one["outcome"] for one in phases.values()} == {"failed"}
    for name in ("tests", "parity"):
        assert phases[name]["said"][0] == gpu_check.NOTHING_RAN
        assert "no GPU" in phases[name]["said"][1]
        assert phases[name]["found"]["passed"] == 0
    for name in ("machine", "sanitizer", "benchmark"):
        assert "driver" in phases[name]["said"][-1]
    assert "failed: machine, tests, parity, sanitizer, benchmark" in page


def test_one_phase_alone_and_a_test_that_fails(gpu, tmp_path):
    """A kernel that is wrong: the tests say which, and nothing else is run."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        f"import sys; sys.path.append({str(ROOT / 'tests' / 'plans')!r})\n"
        "import simulated_machine; simulated_machine.install_here()\n"
        "import ddpm_runtime.noise as noise\n"
        "real = noise.noise\n"
        "noise.noise = lambda *given: real(*given) + 1\n"
    )
    environment = {**gpu, "PYTHONPATH": f"{broken}{os.pathsep}{gpu['PYTHONPATH']}"}
    code, phases, page = check(environment, tmp_path, "--only", "parity", "--select", "noise")
    assert code == 1
    assert list(phases) == ["parity"]
    assert phases["parity"]["found"]["failed"] == 1
    assert phases["parity"]["said"][0].startswith("FAILED tests/cuda/test_cuda_gpu_chunks.py::")
    assert "| parity | failed |" in page


# --- the script's own parts -------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path):
    def make(**options):
        usual = {"budget_s": 100.0, "only": None, "select": None}
        return gpu_check.Check(argparse.Namespace(**{**usual, **options}), tmp_path)

    return make


def test_a_process_that_takes_too_long_is_ended_with_what_it_started(run_of, monkeypatch):
    monkeypatch.setattr(gpu_check, "_LEAST_S", 0.5)
    code = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    began = time.monotonic()
    done = run_of().run([sys.executable, "-c", code], limit_s=0.5)
    assert time.monotonic() - began < 20
    assert done.timed_out
    assert done.code != 0
    assert "begun" in done.text


def test_a_phase_leaves_time_for_those_after_it(run_of):
    everything = run_of(budget_s=540.0)
    everything.waiting = ["parity", "sanitizer", "benchmark"]
    assert 289 < everything.limit_s <= 290
    everything.waiting = []
    assert 539 < everything.limit_s <= 540


def test_a_phase_without_time_says_so_and_fails(run_of):
    spent = run_of(budget_s=1.0)
    for phase in (gpu_check.Check.tests, gpu_check.Check.benchmark):
        outcome = phase(spent)
        assert outcome.outcome == "no time"
        assert outcome.failed


def test_a_tool_that_is_not_here_fails_nothing(run_of, monkeypatch):
    monkeypatch.setenv("PATH", "")
    outcome = run_of().sanitizer()
    assert outcome.said == ["compute-sanitizer is not on PATH"]
    assert not outcome.failed


def test_tests_run_where_pytest_timeout_is_not_installed(run_of, monkeypatch):
    """pyproject.toml names its option, and pytest refuses options that nobody knows."""
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:timeout")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    outcome = run_of(select="compiled_here", only=["tests"]).tests()
    assert outcome.said[0] == gpu_check.NOTHING_RAN, outcome.said  # no GPU: all skipped
    assert outcome.found["skipped"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), ".venv-gpu/bin/python benchmarks/gpu_check.py"),
        (("PYTHON=python9",), "python9 benchmarks/gpu_check.py"),
        (
            ("PYTHON=python9", "GPU_CHECK=--only tests"),
            "python9 benchmarks/gpu_check.py --only tes",
        ),
    ],
)
def test_make_runs_it_in_its_own_environment_or_in_the_one_named(words, expected):
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    inherited = ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")
    clean = {name: value for name, value in os.environ.items() if name not in inherited}
    done = subprocess.run(
        [make, "-n", "gpu-check", *words], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(expected)
    assert ("pip install" in done.stdout) == (not words)
