"""The speed commands: what they write, and what they refuse. Nothing here asserts a time."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from ddpm_bench import machine_rates
from ddpm_bench.speed_commands import SPEED_COMMANDS
from ddpm_bench.speed_report import read_report
from ddpm_bench.throughput_command import saturation
from ddpm_bench.timing import CONTROL, interleave, ratio, summarise
from ddpm_runtime.errors import ConfigurationError

COMMANDS = {command.name: command for command in SPEED_COMMANDS}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_ENGINE_CACHE", str(tmp_path / "cache"))


def invoke(name, *arguments):
    return CliRunner().invoke(COMMANDS[name], [str(one) for one in arguments])


def measure(name, engine, path, *arguments):
    done = invoke(name, "--engine", engine, "--backend", "onnxruntime", "--json", path, *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return read_report(path)


def check_shape(report):
    """What every report promises."""
    text = json.dumps(report)
    assert "/tmp" not in text
    assert report["report_version"] == 1
    assert report["command"].startswith("ddpm-bench ")
    assert report["question"].endswith("?")
    assert report["known_unfairness"]
    machine = report["environment"]
    assert machine["threads"] >= 1
    assert set(machine["load_average"]) == {"before", "after"}
    assert machine["libraries"]["numpy"]
    ids = [case["id"] for case in report["cases"]]
    assert ids
    assert len(set(ids)) == len(ids)
    for case in report["cases"]:
        assert case["summary"]["n"] == len(case["samples"])
        assert case["summary"]["min"] <= case["summary"]["p50"] <= case["summary"]["p99"]


def test_latency_has_steps_and_an_image_with_stable_ids(tiny_engine_path, tmp_path):
    report = measure(
        "latency", tiny_engine_path, tmp_path / "a.json",
        "--batch-size", 1, "--batch-size", 3, "--rounds", 4, "--steps", 5,
    )  # fmt: skip
    check_shape(report)
    assert [case["id"] for case in report["cases"]] == [
        "step/onnxruntime-fp32/ddim/batch-1",
        "step/onnxruntime-fp32/ddim/batch-3",
        "image/onnxruntime-fp32/ddim-5",
    ]
    step = report["cases"][0]
    assert len(step["network_samples"]) == len(step["samples"]) == len(step[CONTROL]) == 4
    assert all(
        inside < whole
        for inside, whole in zip(step["network_samples"], step["samples"], strict=True)
    )


def test_throughput_names_its_saturation_point(tiny_engine_path, tmp_path):
    report = measure(
        "throughput", tiny_engine_path, tmp_path / "a.json",
        "--batch-size", 1, "--batch-size", 2, "--rounds", 3,
    )  # fmt: skip
    check_shape(report)
    assert report["saturation_batch_size"] in (1, 2)


def test_saturation_is_the_smallest_batch_near_the_best():
    rates = {1: 50.0, 2: 96.0, 4: 100.0, 8: 99.0}
    cases = [{"batch_size": n, "evaluations_per_s": rate} for n, rate in rates.items()]
    assert saturation(cases) == 2


def test_startup_splits_cold_and_warm(tiny_engine_path, tmp_path):
    report = measure("startup", tiny_engine_path, tmp_path / "a.json", "--rounds", 1)
    check_shape(report)
    ids = {case["id"] for case in report["cases"]}
    for kind in ("cold", "warm"):
        for part in ("import_ms", "load_ms", "first_image_ms", "total_ms"):
            assert f"startup/onnxruntime/{kind}/{part}" in ids


def test_memory_never_shrinks_from_stage_to_stage(tiny_engine_path, tmp_path):
    report = measure(
        "memory", tiny_engine_path, tmp_path / "a.json", "--rounds", 1, "--batch-size", 2
    )
    check_shape(report)
    peaks = [case["samples"][0] for case in report["cases"]]
    assert peaks == sorted(peaks)
    assert peaks[0] > 1


def test_roofline_counts_the_tiny_network_exactly(tiny_engine_path, tmp_path, monkeypatch):
    monkeypatch.setattr(machine_rates, "_SIZE", 64)
    monkeypatch.setattr(machine_rates, "_COPY_BYTES", 1 << 16)
    report = measure(
        "roofline", tiny_engine_path, tmp_path / "a.json", "--rounds", 3, "--batch-size", 2
    )
    check_shape(report)
    (case,) = report["cases"]
    # one 3×3 convolution of one channel over 8×8, two rows, two operations a product
    assert case["product_flops"] == 2 * (8 * 8) * 9 * 2
    assert case["uncounted"] == []
    assert report["machine"]["copy_gb_per_s"] > 0


def test_profile_accounts_for_the_whole_step(tiny_engine_path, tmp_path):
    report = measure(
        "profile", tiny_engine_path, tmp_path / "a.json",
        "--rounds", 5, "--batch-size", 2, "--sampler", "ddpm",
    )  # fmt: skip
    check_shape(report)
    parts = report["cases"][0]["parts_us"]
    assert parts["noise"] > 0
    assert all(microseconds >= 0 for microseconds in parts.values())


def test_the_same_report_twice_is_no_change_and_a_planted_one_is(tiny_engine_path, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    report = measure("latency", tiny_engine_path, one, "--batch-size", 1, "--rounds", 20)
    case = report["cases"][0]
    case["samples"] = [1.0 + 0.001 * (i % 7) for i in range(20)]
    one.write_text(json.dumps(report))
    case["samples"] = [1.1 * sample for sample in case["samples"]]
    two.write_text(json.dumps(report))
    same = invoke("compare", one, one)
    assert same.exit_code == 0
    assert "no change" in same.output
    slower = invoke("compare", one, two, "--fail-if-slower")
    assert slower.exit_code == 1
    assert "change: 1 slower" in slower.output
    assert "change: 0 slower, 1 faster" in invoke("compare", two, one, "--fail-if-slower").output


def refusal(name, *arguments):
    done = invoke(name, *arguments)
    assert isinstance(done.exception, ConfigurationError), (done.output, done.exception)
    return str(done.exception)


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", 0), ("--rounds", 0), ("--steps", -1)]
)
def test_numbers_that_are_too_small_are_refused(tiny_engine_path, option, value):
    said = refusal("latency", "--engine", tiny_engine_path, option, value)
    assert f"{option} must be ≥ 1" in said


def test_an_unknown_sampler_is_refused_with_the_list(tiny_engine_path):
    said = refusal("latency", "--engine", tiny_engine_path, "--sampler", "dimm")
    assert "ddim" in said


def test_reports_that_cannot_be_compared_are_refused(tiny_engine_path, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    measure("latency", tiny_engine_path, one, "--batch-size", 1, "--rounds", 3)
    measure("throughput", tiny_engine_path, two, "--batch-size", 1, "--rounds", 3)
    assert "compare two reports of one command" in refusal("compare", one, two)
    junk = tmp_path / "junk.json"
    junk.write_text("{}")
    assert "ddpm-bench latency --json" in refusal("compare", one, junk)
    assert "cannot be read" in refusal("compare", one, tmp_path / "missing.json")
    assert "--margin" in refusal("compare", one, one, "--margin", 2)


def test_rounds_are_interleaved_and_warm_up_is_not_counted():
    order = []
    timed = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=5, warm_up=2
    )
    rounds = [tuple(order[i : i + 2]) for i in range(4, 14, 2)]
    assert order[:4] == ["a", "a", "b", "b"]
    assert set(rounds) == {("a", "b"), ("b", "a")}  # in an order that changes
    assert {name: len(samples) for name, samples in timed.samples_ms.items()} == {
        "a": 5, "b": 5, CONTROL: 5,
    }  # fmt: skip


def test_a_budget_ends_the_rounds_but_not_before_three():
    assert interleave({"a": lambda: None}, rounds=50, budget_s=0.0).rounds == 3


def test_ratios_are_taken_round_by_round():
    # both slow down in the second round, the ratio does not
    found = ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert found == {"p50": 2.0, "p5": 2.0, "p95": 2.0}


def test_percentiles_of_a_known_set():
    summary = summarise(list(range(1, 102)))
    assert (summary["p50"], summary["p90"], summary["p99"]) == (51, 91, 100)
    assert summary["mad"] == 25
