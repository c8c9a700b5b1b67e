"""ddpm-bench step-cache, and the pages of quality. Nothing here asserts a time."""

from __future__ import annotations

import copy
import json

import pytest
from click.testing import CliRunner

from ddpm_bench.quality_page import merged_reports, quality_section
from ddpm_bench.results_command import results_command
from ddpm_bench.results_page import results_page
from ddpm_bench.speed_report import read_report
from ddpm_bench.step_cache_command import step_cache_command
from ddpm_export.again import bundle_from_engine


@pytest.fixture(scope="module")
def cached_engine_path(shipped_engine_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("cached") / "cached.engine"
    bundle_from_engine(shipped_engine_path, path, step_cache=1, threads=1)
    return path


def run(*arguments):
    return CliRunner().invoke(step_cache_command, [str(one) for one in arguments])


def test_every_interval_is_timed_against_every_evaluation_whole(cached_engine_path, tmp_path):
    path = tmp_path / "step-cache.json"
    done = run(
        *("--engine", cached_engine_path, "--interval", 3, "--steps", 4, "--rounds", 3),
        *("--batch-size", 2, "--threads", 1, "--json", path),
    )
    assert done.exit_code == 0, done.output
    report = read_report(path)
    assert [case["interval"] for case in report["cases"]] == [1, 3]
    assert report["cases"][0]["faster"]["p50"] == 1.0
    assert all("quality" not in case for case in report["cases"])
    page = results_page([report])
    assert "## step-cache: fashion-mnist" in page
    assert "| 3 evaluations |" in page


def test_an_engine_without_a_cache_is_refused_before_anything_is_timed(shipped_engine_path):
    done = run("--engine", shipped_engine_path)
    assert "--step-cache" in str(done.exception)
    assert run("--engine", shipped_engine_path, "--interval", 0).exception is not None


def report_of(sampler, evaluations, *, n=100, guidance=1.0, command="ddpm-bench quality a"):
    source = {
        "engine": "e", "network_sha256": "ab", "sampler": sampler, "spacing": "karras",
        "evaluations": evaluations, "guidance_scale": guidance, "backend": "ONNX Runtime",
    }  # fmt: skip
    floor = {
        "n": n, "against": 1000, "frechet": 0.01, "frechet_deviation": None, "kid": 0.0,
        "kid_deviation": None,
    }  # fmt: skip
    case = {"source": source, "n": n, "frechet": 0.5, "kid": {"mean": 0.002, "deviation": 0.001}}
    return {
        "report": "ddpm-bench quality", "question": "Good?", "known_unfairness": ["no"],
        "judge": {"sha256": "j"}, "command": command,
        "floors": [{"name": "train", **floor}, {"name": "halves", **floor}], "cases": [case],
    }  # fmt: skip


def test_a_sweep_measured_in_parts_is_one_table():
    parts = [
        report_of("ddim", 5), report_of("ddim", 10, command="ddpm-bench quality b"),
        report_of("heun", 9), report_of("ddim", 5, n=7), report_of("ddim", 5, guidance=2.0),
    ]  # fmt: skip
    merged = merged_reports(copy.deepcopy(parts))
    assert [len(one["cases"]) for one in merged] == [3, 1, 1]
    page = quality_section(merged[0], "quality.png")
    assert "| Fréchet distance (KID × 1000) | 5 | 9 | 10 |" in page
    assert "| ddim, karras | 0.500 (2.00) |  | 0.500 (2.00) |" in page
    assert "| heun, karras |  | 0.500 (2.00) |  |" in page
    assert page.count("`ddpm-bench quality") == 2
    assert "(quality.png)" in page


def test_results_has_the_quality_too(tmp_path):
    for i, evaluations in enumerate((5, 10)):
        text = json.dumps(report_of("ddim", evaluations))
        (tmp_path / f"quality-{i}.json").write_text(text)
    out = tmp_path / "RESULTS.md"
    done = CliRunner().invoke(results_command, ["--folder", str(tmp_path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "## quality: e, 100 images a case, no guidance" in out.read_text()
    assert (tmp_path / "quality.png").exists()
