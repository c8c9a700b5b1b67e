"""ddpm-bench gpu on the simulated device: what it writes, leaves out, and refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed")
sys.path.append(str(Path(__file__).parent.parent / "plans"))
from simulated_machine import host_kernels, install

from ddpm_bench import gpu_command, gpu_matrix, gpu_torch
from ddpm_bench.gpu_budget import Budget
from ddpm_bench.gpu_subjects import SHIPPED_ENGINE, subject_from_engine
from ddpm_bench.gpu_timing import ChunkTimer, host_gap_share
from ddpm_bench.gpu_torch import TORCH_WAYS, TorchBatch
from ddpm_bench.graph_cost import count_graph
from ddpm_bench.speed_report import read_report
from ddpm_bench.stepping import program_for
from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.errors import BackendError, BackendUnavailableError, ConfigurationError


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return host_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def driver(kernels, monkeypatch, tmp_path):
    """The only GPU of this machine; TensorRT and ONNX Runtime are installed."""
    return install(monkeypatch, kernels, tmp_path / "plans")


def invoke(*arguments):
    return CliRunner().invoke(gpu_command.gpu_command, [str(one) for one in arguments])


def measure(engine, path, *arguments):
    done = invoke("--engine", engine, "--json", path, "--rounds", 3, "--steps", 4, *arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return read_report(path), done.output


def test_every_backend_and_graph_level_is_timed_and_gives_the_same_pixels(
    driver, tiny_engine_path, tmp_path
):
    report, said = measure(
        tiny_engine_path, tmp_path / "a.json", "--batch-size", 1, "--batch-size", 4
    )
    names = [
        *(
            f"tensorrt-{p}-{level}"
            for p in ("fp32", "bf16", "fp16")
            for level in ("L0", "L1", "L2")
        ),
        *(f"onnxruntime-{precision}-L0" for precision in ("fp32", "bf16", "fp16")),
    ]
    measured = {case["id"] for case in report["cases"]}
    left_out = {one["id"] for one in report["skipped"]}
    assert measured | left_out == {
        f"gpu/tiny/batch-{batch}/{name}" for batch in (1, 4) for name in [*names, "torch"]
    }
    assert {f"gpu/tiny/batch-4/{name}" for name in names if "fp32" in name} <= measured
    for case in report["cases"]:
        assert len(case["samples"]) == len(case["row_samples"]) == case["summary"]["n"] == 3
        assert case["backend"].startswith(("TensorRT 11.4", "ONNX Runtime 1.31.1, CUDA"))
        assert case["images_per_s"] == pytest.approx(
            1e3 * case["batch_size"] / case["summary"]["p50"]
        )
        assert case["evaluations_per_s"] == pytest.approx(4 * case["images_per_s"])
        gap = 1 - case["device_row_ms"] / case["row_ms"]
        assert case["host_gap_share"] == pytest.approx(gap)
        assert "held" in case["device_time"]
        assert case["gflops"] > 0
        assert case["mfu"] is None
        if case["precision"] == "fp32":
            assert case["pixels_from"]["most_levels"] == 0
    assert "tensorrt-fp32-L2" in said
    assert "host gap" in said
    assert "not measured on Simulated GPU: torch" in said
    assert not driver.memory
    assert driver.retained == 0
    assert not driver.handles


def test_the_setup_is_split_and_a_plan_is_built_once(driver, tiny_engine_path, tmp_path):
    report, _ = measure(
        tiny_engine_path, tmp_path / "a.json",
        "--batch-size", 2, "--backend", "tensorrt", "--only", "fp32",
    )  # fmt: skip
    first, second, third = (case["setup"] for case in report["cases"])
    assert set(first) == {
        "open_ms", "build_ms", "load_ms", "first_batch_ms", "steady_batch_ms"
    }  # fmt: skip
    assert first["build_ms"] is not None
    assert first["load_ms"] > 0
    assert second["build_ms"] is third["build_ms"] is second["open_ms"] is None
    again, _ = measure(
        tiny_engine_path, tmp_path / "b.json", "--batch-size", 2, "--only", "tensorrt-fp32-L0"
    )
    assert again["cases"][0]["setup"]["build_ms"] is None  # it was in the cache


def test_the_report_names_gpu_driver_libraries_and_what_is_missing(
    kernels, monkeypatch, tiny_engine_path, tmp_path
):
    install(monkeypatch, kernels, tmp_path, libraries=["onnxruntime"])
    report, said = measure(tiny_engine_path, tmp_path / "a.json", "--batch-size", 1)
    assert report["gpu"]["name"] == "Simulated GPU"
    assert report["gpu"]["compute_capability"] == "8.9"
    assert report["gpu"]["cuda"] == "13.0"
    assert report["gpu"]["libraries"]["cuda-bindings"]
    assert report["backends"]["ran"] == ["onnxruntime"]
    assert "pip install 'ddpm-engine[tensorrt]'" in report["backends"]["missing"]["tensorrt"]
    assert "pip install 'ddpm-engine[rtx]'" in report["backends"]["missing"]["tensorrt_rtx"]
    assert "Not here: tensorrt: tensorrt is needed" in said
    assert report["command"].startswith("ddpm-bench gpu --engine tiny.engine --batch-size 1")
    assert "/tmp" not in json.dumps(report)


def test_a_level_that_a_backend_cannot_have_is_named(driver, tiny_engine_path, tmp_path):
    done = invoke("--engine", tiny_engine_path, "--backend", "onnxruntime", "--graph-level", "L1")
    assert isinstance(done.exception, BackendError)
    assert "CUDA graph of its own" in str(done.exception)
    assert "skipped: gpu/tiny/batch-512/onnxruntime: it runs a CUDA graph of its own" in done.output


def test_memory_that_is_out_is_a_skipped_case_and_the_others_go_on(
    kernels, monkeypatch, tiny_engine_path, tmp_path
):
    install(monkeypatch, kernels, tmp_path, memory_bytes=300_000)
    report, _ = measure(
        tiny_engine_path, tmp_path / "a.json",
        "--batch-size", 2, "--batch-size", 512, "--only", "fp32",
    )  # fmt: skip
    assert {case["batch_size"] for case in report["cases"]} == {2}
    reasons = {one["reason"] for one in report["skipped"] if "batch-512" in one["id"]}
    assert any(reason.startswith("OutOfDeviceMemoryError: neither 512 nor") for reason in reasons)


def test_a_budget_that_is_spent_skips_everything_and_says_so(driver, tiny_engine_path, tmp_path):
    done = invoke("--engine", tiny_engine_path, "--budget-s", 0.001, "--backend", "onnxruntime")
    assert isinstance(done.exception, BackendError)
    assert "no time" in str(done.exception)
    for batch in (1, 8, 64, 512):
        assert f"skipped: gpu/tiny/batch-{batch}/onnxruntime-fp32-L0: no time" in done.output


def test_what_was_measured_is_kept_when_the_command_is_ended(
    driver, tiny_engine_path, tmp_path, monkeypatch
):
    measured = gpu_command._measure

    def once(group, *given):
        if group.batch == 2:
            raise KeyboardInterrupt
        return measured(group, *given)

    monkeypatch.setattr(gpu_command, "_measure", once)
    path = tmp_path / "a.json"
    done = invoke(
        "--engine", tiny_engine_path, "--json", path, "--rounds", 3, "--steps", 4,
        "--only", "tensorrt-fp32-L0", "--batch-size", 1, "--batch-size", 2,
    )  # fmt: skip
    assert done.exit_code == 1
    assert [case["batch_size"] for case in read_report(path)["cases"]] == [1]


def test_without_a_gpu_there_is_one_line_and_exit_code_1(tiny_engine_path):
    words = [sys.executable, "-m", "ddpm_bench", "gpu", "--engine", str(tiny_engine_path)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "NVIDIA driver" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("option", "value"), [("--batch-size", 0), ("--rounds", 0)])
def test_numbers_that_are_too_small_are_refused(option, value):
    done = invoke(option, value)
    assert isinstance(done.exception, ConfigurationError)
    assert f"{option} must be ≥ 1" in str(done.exception)


def test_tables_are_written_as_markdown(driver, tiny_engine_path, tmp_path):
    page = tmp_path / "gpu.md"
    measure(
        tiny_engine_path, tmp_path / "a.json",
        "--batch-size", 1, "--only", "tensorrt-fp32", "--markdown", page,
    )  # fmt: skip
    text = page.read_text()
    assert "## tiny, batch 1, 4 rows of DDIM (tensorrt and onnxruntime)" in text
    assert "| tensorrt-fp32-L2 |" in text
    assert "Not here: tensorrt_rtx" in text


# --- PyTorch beside us ------------------------------------------------------------------------


def test_pytorch_is_timed_in_the_same_rounds_and_compared_with_every_way(
    driver, shipped_engine_path, tmp_path, monkeypatch
):
    """PyTorch on the processor stands for PyTorch on the GPU."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    rates = {"fp32": 1e4, "bf16": 1e5}
    monkeypatch.setattr(gpu_command, "cuda_torch", lambda: torch)
    monkeypatch.setattr(gpu_command, "matmul_gflops", lambda torch: rates)
    monkeypatch.setattr(gpu_matrix, "TORCH_WAYS", TORCH_WAYS[:2])
    monkeypatch.setattr(gpu_matrix, "TorchBatch", partial(TorchBatch, device="cpu"))
    report, said = measure(
        shipped_engine_path, tmp_path / "a.json",
        "--batch-size", 2, "--only", "torch", "--only", "onnxruntime-fp32",
    )  # fmt: skip
    cases = {case["way"]: case for case in report["cases"]}
    assert list(cases) == ["onnxruntime-fp32-L0", "torch-eager-fp32", "torch-eager-bf16"]
    ours = cases["onnxruntime-fp32-L0"]
    assert set(ours["over"]) == {"torch-eager-fp32", "torch-eager-bf16"}
    flops = count_graph(read_bundle(shipped_engine_path).network_bytes, 2).product_flops
    assert ours["gflops"] == pytest.approx(flops / ours["row_ms"] / 1e6)
    assert ours["mfu"] == pytest.approx(ours["gflops"] / rates["fp32"])
    assert cases["torch-eager-fp32"]["pixels_from"]["way"] == "onnxruntime-fp32-L0"
    assert cases["torch-eager-fp32"]["pixels_from"]["most_levels"] <= 1
    assert cases["torch-eager-bf16"]["mfu"] == pytest.approx(
        cases["torch-eager-bf16"]["gflops"] / rates["bf16"]
    )
    assert "matrix products, which MFU is a share of: fp32 10.0, bf16 100.0 TFLOP/s" in said


def test_pytorch_draws_the_engines_own_pixels():
    """The same weights and the same arithmetic: in float32 not one level apart."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    subject = subject_from_engine(SHIPPED_ENGINE)
    network = subject.network()
    program = program_for(subject.bundle, "ddim", 6)
    with Engine.load(SHIPPED_ENGINE, device="cpu", threads=1) as engine:
        asked = {"steps": 6, "sampler": "ddim", "guidance_scale": 1.0}
        expected = [engine.sample(1, first_index=i, label=i, **asked)[0] for i in range(3)]
    most = {"fp32": 1, "bf16": 16}
    for way in TORCH_WAYS[:2]:
        batch = TorchBatch(
            torch, network, way, program,
            image=(1, 28, 28), batch=3, num_classes=10, device="cpu",
        )  # fmt: skip
        found = batch()
        assert np.array_equal(found, batch())
        assert np.abs(found.astype(int) - np.stack(expected)).max() <= most[way.precision]
        batch.close()


def test_pytorch_is_not_timed_with_a_sampler_it_cannot_follow():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    subject = subject_from_engine(SHIPPED_ENGINE)
    with pytest.raises(ConfigurationError, match="one register and no noise"):
        TorchBatch(
            torch, None, TORCH_WAYS[0], program_for(subject.bundle, "dpmpp_2m", 6),
            image=(1, 28, 28), batch=1, num_classes=10, device="cpu",
        )  # fmt: skip


def test_another_checkpoint_is_not_called_the_same_weights(tmp_path, tiny_engine_path):
    copy = tmp_path / "other.engine"
    copy.mkdir()
    for file in tiny_engine_path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert "no other/model.pt beside other.engine" in subject_from_engine(copy).no_network
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.pt").write_bytes(b"weights")
    assert "is not the checkpoint" in subject_from_engine(copy).no_network


def test_a_build_of_torch_without_cuda_is_named(monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(BackendUnavailableError, match="is a build without CUDA"):
        gpu_torch.cuda_torch()


# --- the clocks -------------------------------------------------------------------------------


def test_a_host_gap_is_what_the_device_did_not_work():
    assert host_gap_share(0.75, 1.0) == 0.25
    assert host_gap_share(1.0, 1.0) == 0.0


@pytest.fixture
def lanes(driver, tiny_engine_path):
    from ddpm_runtime.cuda.runner import open_network

    bundle = read_bundle(tiny_engine_path)
    with open_device() as device:
        backend = open_network(bundle, device, "tensorrt", buckets=(2, 4))
        with CudaLanes(device, backend, 2, graph_level="L0") as made:
            made.warm_up()
            for index in range(2):
                made.start(program_for(bundle, "ddim", 5), seed=0, index=index, label=0)
            yield device, made


def test_a_held_stream_begins_when_the_last_row_is_on_it(driver, lanes):
    device, made = lanes
    timer = ChunkTimer(device)
    made.around_chunk = timer.held
    before = len(driver.log)
    made.advance(3)
    log = driver.log[before:]
    assert log.index("cuStreamWaitValue32") < log.index("cuEventRecord") < log.index("network")
    inside = log[log.index("cuStreamWaitValue32") : log.index("cuMemcpyDtoHAsync")]
    assert [call for call in inside if "Synchronize" in call] == []
    assert inside.count("cuEventRecord") == 2
    assert timer.elapsed_ms() > 0
    assert not timer.interrupted
    timer.close()


def test_a_chunk_that_waits_for_the_device_is_let_go_and_told(driver, lanes):
    device, made = lanes
    timer = ChunkTimer(device, patience_s=0.1)
    made.around_chunk = timer.held
    enqueue = made._loop.run
    made._loop.run = lambda *rows: (enqueue(*rows), made._stream.synchronize())
    made.advance(2)
    assert timer.interrupted
    del made._loop.run
    made.advance(2)
    assert not timer.interrupted
    timer.close()


# --- the budget -------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_group_leaves_the_reserve_of_those_after_it():
    clock = Clock()
    budget = Budget(100, groups=4, reserve_s=10, clock=clock)
    budget.next_group()
    assert budget.free_s == 70
    assert budget.share_s == 17.5
    assert budget.refusal("slow", 70) == ""
    assert "about 71 s to get ready, 70 s left for it" in budget.refusal("slow", 71)
    clock.now = 60
    assert budget.share_s == 5  # half a reserve, though the group before took it all
    clock.now = 97
    assert budget.share_s == 3
    assert budget.left_s == 3


def test_what_took_long_is_expected_to_take_as_long_again():
    budget = Budget(30, groups=1, reserve_s=10, clock=Clock())
    budget.next_group()
    assert budget.refusal("build", 5) == ""
    budget.took("build", 40)
    budget.took("build", 2)
    assert "about 40 s" in budget.refusal("build", 5)
