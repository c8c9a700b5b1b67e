"""ddpm-bench results --measure: each report of what it is about, in a process of its own."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from click.testing import CliRunner

from ddpm_bench import peer_networks, results_command
from ddpm_runtime.bundle import read_bundle


@pytest.fixture
def measured(monkeypatch):
    """What would be run, with the engine it would be given."""
    commands = []

    def run(words, **_):
        words = [str(word) for word in words[3:]]
        bundle = read_bundle(words[words.index("--engine") + 1]) if "--engine" in words else None
        commands.append((words, bundle))
        return subprocess.CompletedProcess(words, 1 if "memory" in words else 0)

    monkeypatch.setattr(results_command.subprocess, "run", run)
    small = replace(peer_networks.NETWORKS["cifar-10"], image_size=8, channels=32)
    monkeypatch.setitem(peer_networks.NETWORKS, "cifar-10", small)
    return commands


def invoke(folder, *words):
    arguments = ["--folder", folder, "--out", folder / "R.md", *words]
    return CliRunner().invoke(results_command.results_command, [str(one) for one in arguments])


def test_each_command_is_given_the_engine_it_measures(measured, shipped_engine_path, tmp_path):
    only = [
        f"--only={name}" for name in ("whole", "step-cache", "roofline-cifar-10", "peers-cifar-10")
    ]
    done = invoke(
        tmp_path, "--measure", *only, "--engine", shipped_engine_path, "--data", "garments"
    )
    assert "no reports" in str(done.exception)  # nothing was run here
    (whole, own), (cache, cached), (roofline, large), (peers, none) = measured
    assert whole[0] == "whole"
    assert own.manifest == read_bundle(shipped_engine_path).manifest
    assert cache[0] == "step-cache"
    assert cache[-4:-2] == ["--data", "garments"]
    assert cached.cached is not None
    assert roofline[0] == "roofline"
    assert large.manifest.image.channels == 3
    assert peers[0] == "peers"
    assert none is None
    for words, name in ((whole, "whole"), (cache, "step-cache"), (roofline, "roofline-cifar-10")):
        assert words[-2:] == ["--json", str(tmp_path / f"{name}.json")]


def test_the_first_command_that_fails_ends_it(measured, shipped_engine_path, tmp_path):
    done = invoke(
        tmp_path, "--measure", "--only=memory", "--only=whole", "--engine", shipped_engine_path
    )
    assert "ddpm-bench memory failed" in str(done.exception)
    assert len(measured) == 1


def test_measuring_needs_an_engine(tmp_path):
    assert "give --engine" in str(invoke(tmp_path, "--measure").exception)
