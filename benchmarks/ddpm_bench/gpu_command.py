"""ddpm-bench gpu: whole batches on a CUDA device, by every backend, graph level and precision.

``python -m ddpm_bench.gpu_command gpu`` is the same where ONNX Runtime is not installed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.console import run_command
from ddpm_runtime.cuda.device import Device, open_device
from ddpm_runtime.cuda.runner import open_network
from ddpm_runtime.errors import BackendError, BackendUnavailableError, ConfigurationError, DDPMError
from ddpm_runtime.runner import CUDA_BACKENDS

from .gpu_budget import Budget
from .gpu_cases import cases_of, row_flops, skipped
from .gpu_machine import gpu_facts, matmul_gflops
from .gpu_matrix import LEVELS, Group, our_ways, torch_ways
from .gpu_ours import Networks
from .gpu_subjects import SHIPPED_ENGINE, Subject, cifar_subject, subject_from_engine
from .gpu_tables import markdown, print_tables
from .gpu_torch import cuda_torch
from .report import check_folder, check_json, write_json
from .speed_options import check_positive, json_option
from .speed_report import Case, finish, load_average, make_report
from .stepping import program_for

__all__ = ["gpu_command"]

_QUESTION = "How fast is a whole batch on this GPU, and how much of the time is the GPU at work?"
_UNFAIR = [
    "a batch is: start the lanes, every row, pixels on the host; PyTorch has x_T on the device "
    "before the clock starts, and its weights in bfloat16",
    "PyTorch's bf16 is autocast; ours keeps normalisation, softmax, time embedding and the first "
    "and last layer in float32 as well",
    "a TensorRT plan is built for the timed batch alone; Engine builds one for all powers of two",
    "graph levels of one backend share its weights: only the first pays for opening and building",
    "device time is taken on a few rows, apart from the rounds; a host gap may come out below 0",
    "the CIFAR-10 network's weights are random: its images mean nothing, its speed does",
]


@click.command("gpu")
@click.option(
    "--engine", "engine_paths", multiple=True, type=click.Path(path_type=Path),
    help="Engine bundle.  [default: the shipped one, and a CIFAR-10 network of 35.7 M parameters]",
)  # fmt: skip
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64, 512))
@click.option(
    "--graph-level", "levels", type=click.Choice(LEVELS), multiple=True, default=LEVELS,
    help="Where the backend can be captured.",
)  # fmt: skip
@click.option(
    "--backend", "backends", type=click.Choice(CUDA_BACKENDS), multiple=True,
    help="[default: those that are installed]",
)  # fmt: skip
@click.option("--device", "ordinal", default=0, help="Number of the CUDA device.")
@click.option("--only", multiple=True, help="Ways whose name holds one of these words.")
@click.option("--steps", default=20, help="Rows of a batch: DDIM steps.")
@click.option("--rounds", default=20, help="Timed batches of each way, at most.")
@click.option("--budget-s", default=480.0, help="For everything; what does not fit is named.")
@json_option
@click.option(
    "--markdown", "markdown_path", type=click.Path(path_type=Path), help="Write the tables."
)
@click.pass_context
def gpu_command(
    context: click.Context, /, engine_paths: tuple[Path, ...], batch_sizes: tuple[int, ...],
    levels: tuple[str, ...], backends: tuple[str, ...], ordinal: int, only: tuple[str, ...],
    steps: int, rounds: int, budget_s: float, json_path: Path | None, markdown_path: Path | None,
) -> None:  # fmt: skip
    """Time whole batches on a GPU, by us and by PyTorch, interleaved in one run."""
    check_positive(batch_size=batch_sizes, steps=steps, rounds=rounds, budget_s=budget_s)
    check_json(json_path)
    if markdown_path is not None:
        check_folder(markdown_path)
    began, load = time.monotonic(), load_average()
    with open_device(ordinal) as device:
        subjects, absent = _subjects(engine_paths)
        found, missing = _installed(subjects[0], device, backends or CUDA_BACKENDS)
        torch = _torch()
        rates = {} if isinstance(torch, DDPMError) else matmul_gflops(torch)
        groups = [
            Group(subject=subject, batch=batch, program=program_for(subject.bundle, "ddim", steps))
            for batch in _extremes_first(batch_sizes)
            for subject in subjects
        ]
        budget = Budget(budget_s - (time.monotonic() - began), groups=len(groups))
        cases: list[Case] = []

        def report() -> dict[str, Any]:
            made = make_report(
                context, question=_QUESTION, known_unfairness=_UNFAIR, threads=None,
                load_before=load,
            )  # fmt: skip
            why = str(torch) if isinstance(torch, DDPMError) else ""
            limits = {"matmul_gflops": rates, "matmul_not_measured": why}
            made["gpu"] = gpu_facts(device) | limits
            made["backends"] = {"ran": found, "missing": missing}
            made["cases"], made["skipped"] = sorted(cases, key=_order), absent + skipped(groups)
            made["budget_s"] = {"asked": budget_s, "left": round(budget.left_s, 1)}
            return made

        for group in groups:
            budget.next_group()
            cases += _measure(group, device, budget, found, levels, torch, rates, only, rounds)
            _write(report(), json_path, markdown_path)  # what comes next may not end well
        last = report()
    print_tables(last)
    finish(last, json_path)
    if not cases:
        reasons = {one["reason"] for one in last["skipped"]}
        raise BackendError(f"nothing could be measured: {'; '.join(sorted(reasons))}")


def _extremes_first(batch_sizes: Sequence[int]) -> list[int]:
    """The smallest, the largest, and what is between: what time is left for last matters least."""
    ascending = sorted(set(batch_sizes))
    return list(dict.fromkeys([ascending[0], ascending[-1], *ascending]))


def _subjects(paths: Sequence[Path]) -> tuple[list[Subject], list[dict[str, str]]]:
    """The networks to be timed, and those that cannot be had here."""
    if paths:
        return [subject_from_engine(path) for path in paths], []
    if not SHIPPED_ENGINE.exists():
        raise ConfigurationError("the shipped engine is not here; name one with --engine.")
    subjects = [subject_from_engine(SHIPPED_ENGINE)]
    try:
        click.echo("exporting the CIFAR-10 network", err=True)
        subjects.append(cifar_subject())
    except DDPMError as error:
        return subjects, [{"id": "gpu/cifar-10", "reason": str(error)}]
    return subjects, []


def _installed(
    subject: Subject, device: Device, backends: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Which backends can be used here, and why the others cannot."""
    found, missing = [], {}
    for name in backends:
        try:
            open_network(subject.bundle, device, name, buckets=(1,)).close()
            found.append(name)
        except BackendUnavailableError as error:
            missing[name] = str(error)
    return found, missing


def _torch() -> Any:
    """PyTorch with a GPU, or the error that says why not."""
    try:
        return cuda_torch()
    except BackendUnavailableError as error:
        return error


def _measure(
    group: Group, device: Device, budget: Budget, backends: list[str], levels: Sequence[str],
    torch: Any, rates: dict[str, float], only: tuple[str, ...], rounds: int,
) -> list[Case]:  # fmt: skip
    """One group; its cases."""
    cases: list[Case] = []
    networks = Networks(device, group.batch)
    ways = [*our_ways(group, networks, backends, levels), *torch_ways(group, torch)]
    wanted = [way for way in ways if not only or any(word in way.name for word in only)]
    try:
        group.measure(
            wanted,
            budget,
            rounds=rounds,
            report=lambda measured: cases.extend(
                cases_of(group, measured, row_flops(group.subject.bundle), rates)
            ),
            progress=lambda said: click.echo(f"{budget.left_s:4.0f} s left: {said}", err=True),
        )
    finally:
        networks.close()
    return cases


def _order(case: Case) -> tuple[str, int]:
    return case["network"], case["batch_size"]


def _write(report: dict[str, Any], json_path: Path | None, markdown_path: Path | None) -> None:
    """Write what there is so far, where asked."""
    if json_path is not None:
        write_json(json_path, report)
    if markdown_path is not None:
        with atomic_file(markdown_path) as file:
            file.write(markdown(report).encode())


if __name__ == "__main__":
    sys.exit(run_command(click.Group("ddpm-bench", {"gpu": gpu_command})))
