"""ddpm-bench memory: the most that the process ever held, step by step, in fresh processes."""

from __future__ import annotations

from pathlib import Path

import click

from .fresh_process import run_fresh
from .report import print_rows
from .speed_options import check_positive, engine_options, json_option
from .speed_report import finish, load_average, make_report, sampled_case

__all__ = ["memory_command"]

_QUESTION = "How much memory does the process take at its peak?"
_UNFAIR = [
    "resident memory counts shared libraries whole, though other processes may share them",
    "a peak before the network is loaded hides a smaller one after",
    "read from /proc/self/status: Linux only",
]
_STAGES = ("interpreter", "import", "load", "first_image", "batch")

_CODE = """
import json, sys
def peak():
    # not getrusage: its peak begins with the memory of the process that started this one
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("no VmHWM in /proc/self/status")
found = {"interpreter": peak()}
from ddpm_runtime import Engine
found["import"] = peak()
path, device, backend, precision, threads, batch = sys.argv[1:]
engine = Engine.load(path, device=device, backend=backend, precision=precision,
                     threads=int(threads) or None)
found["load"] = peak()
engine.sample(1, steps=2)
found["first_image"] = peak()
engine.sample(int(batch), steps=2, batch_size=int(batch))
found["batch"] = peak()
print(json.dumps({"peaks": found, "backend": engine.description}))
"""


@click.command("memory")
@engine_options
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64))
@click.option("--rounds", default=3, help="Fresh processes of each batch size.")
@json_option
@click.pass_context
def memory_command(
    context: click.Context, /, engine_path: Path, batch_sizes: tuple[int, ...], rounds: int,
    json_path: Path | None, device: str, backend: str, precision: str, threads: int | None,
) -> None:  # fmt: skip
    """Peak resident memory after import, load, the first image and a whole batch."""
    check_positive(batch_size=batch_sizes, rounds=rounds)
    load = load_average()
    words = [str(engine_path), device, backend, precision, str(threads or 0)]
    cases, described = [], ""
    for batch in sorted(set(batch_sizes)):
        runs = [run_fresh(_CODE, *words, str(batch)) for _ in range(rounds)]
        described = runs[-1]["backend"]
        for stage in _STAGES:
            samples = [run["peaks"][stage] for run in runs]
            case_id = f"memory/{backend}-{precision}/batch-{batch}/{stage}"
            cases.append(sampled_case(case_id, samples, unit="MiB", batch_size=batch, stage=stage))
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=threads,
        load_before=load,
    )
    report["engine"] = {"name": engine_path.name, "backend": described}
    report["cases"] = cases
    rows: list[tuple[str, ...]] = [("peak MiB", *_STAGES)]
    for batch in sorted(set(batch_sizes)):
        peaks = [case["summary"]["p50"] for case in cases if case["batch_size"] == batch]
        rows.append((f"batch {batch}", *(f"{peak:.0f}" for peak in peaks)))
    print_rows(rows)
    finish(report, json_path)
