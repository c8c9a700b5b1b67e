"""ddpm-bench startup: from nothing to the first image, in fresh processes, split."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .fresh_process import run_fresh
from .report import print_rows
from .speed_options import check_positive, engine_options, json_option
from .speed_report import Case, finish, load_average, make_report, sampled_case

__all__ = ["startup_command"]

_QUESTION = "How long from starting Python to the first image, and where does it go?"
_UNFAIR = [
    "files are in the page cache: the disk is not measured",
    "'cold' has an empty folder of compiled networks and calibrations, 'warm' a full one",
    "the first image takes --steps steps",
]
_PARTS = ("interpreter_ms", "import_ms", "load_ms", "first_image_ms", "second_image_ms", "total_ms")

_CODE = """
import time
began = time.perf_counter()
import json, sys
from ddpm_runtime import Engine
imported = time.perf_counter()
path, device, backend, precision, threads, steps = sys.argv[1:]
engine = Engine.load(path, device=device, backend=backend, precision=precision,
                     threads=int(threads) or None)
loaded = time.perf_counter()
engine.sample(1, steps=int(steps))
first = time.perf_counter()
engine.sample(1, steps=int(steps))
second = time.perf_counter()
parts = {"import_ms": imported - began, "load_ms": loaded - imported,
         "first_image_ms": first - loaded, "second_image_ms": second - first}
print(json.dumps({"parts": {k: 1e3 * v for k, v in parts.items()},
                  "backend": engine.description}))
"""


@click.command("startup")
@engine_options
@click.option("--steps", default=10, help="Steps of the first image.")
@click.option("--rounds", default=5, help="Fresh processes of each kind.")
@json_option
@click.pass_context
def startup_command(
    context: click.Context, /, engine_path: Path, steps: int, rounds: int,
    json_path: Path | None, device: str, backend: str, precision: str, threads: int | None,
) -> None:  # fmt: skip
    """Start fresh processes, with an empty cache (cold) and with a full one (warm)."""
    check_positive(steps=steps, rounds=rounds)
    load = load_average()
    words = [str(engine_path), device, backend, precision, str(threads or 0), str(steps)]
    runs: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
    for _ in tqdm(range(rounds), unit=" rounds", file=sys.stderr):
        with tempfile.TemporaryDirectory() as folder:
            cache = {"DDPM_ENGINE_CACHE": str(Path(folder) / "cache")}
            for found in runs.values():  # cold fills the cache that warm finds
                found.append(run_fresh(_CODE, *words, environment=cache))
    cases = [case for kind, found in runs.items() for case in _cases(kind, backend, found)]
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=threads,
        load_before=load,
    )
    report["engine"] = {"name": engine_path.name, "backend": runs["warm"][-1]["backend"]}
    report["cases"] = cases
    medians: dict[str, dict[str, float]] = {kind: {} for kind in runs}
    for case in cases:
        kind, part = case["id"].split("/")[-2:]
        medians[kind][part] = case["summary"]["p50"]
    report["warm_over_cold"] = medians["warm"]["total_ms"] / medians["cold"]["total_ms"]
    rows = [("median ms", *runs)]
    rows += [(part, *(f"{medians[kind][part]:.0f}" for kind in runs)) for part in _PARTS]
    click.echo(f"{runs['cold'][-1]['backend']}\n{runs['warm'][-1]['backend']}\n")
    print_rows(rows)
    click.echo(f"\nwarm / cold, whole process: {report['warm_over_cold']:.2f}")
    finish(report, json_path)


def _cases(kind: str, backend: str, found: list[dict[str, Any]]) -> list[Case]:
    """A case for every part of the time."""
    for run in found:
        parts = run["parts"]
        known = sum(parts.values())
        parts["total_ms"] = 1e3 * run["process_s"]
        parts["interpreter_ms"] = parts["total_ms"] - known  # start, and end
    return [
        sampled_case(f"startup/{backend}/{kind}/{part}", [run["parts"][part] for run in found])
        for part in _PARTS
    ]
