"""The one shape of every speed report, and the tables that people read.

    report, report_version      "ddpm-bench NAME", 1
    question, known_unfairness  what is asked; what the numbers cannot say
    command, environment        how to get them again; on what, with what, how busy it was
    cases                       [{id, unit, samples, summary, warm_up, control, …}]

A case's id is stable: reports of different days and machines are joined on it.
"""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import msgspec

from ddpm_runtime.backends.processors import usable_processors
from ddpm_runtime.errors import ConfigurationError

from .report import command_line, environment, print_machine, print_rows, write_json
from .timing import CONTROL, Timed, summarise

__all__ = [
    "Case",
    "finish",
    "load_average",
    "make_report",
    "print_cases",
    "read_report",
    "sampled_case",
    "timed_case",
]

_LIBRARIES = ("openvino", "diffusers", "onnx")
_MAX_REPORT_BYTES = 256 << 20

Case = dict[str, Any]


class _Case(msgspec.Struct):
    """What every case has; each command adds its own fields."""

    id: str
    unit: str
    samples: list[float]
    summary: dict[str, float]


class _Report(msgspec.Struct):
    """What every speed report has."""

    report: str
    report_version: int
    question: str
    known_unfairness: list[str]
    command: str
    environment: dict[str, Any]
    cases: list[_Case]


def make_report(
    context: click.Context,
    *,
    question: str,
    known_unfairness: list[str],
    threads: int | None,
    load_before: tuple[float, float, float] | None,
) -> dict[str, Any]:
    """A report without cases.

    Args:
        context: of the sub-command.
        question: what the numbers answer.
        known_unfairness: what they cannot say.
        threads: asked for; None means the usable processors.
        load_before: load average when the command began.
    """
    machine = environment()
    machine["libraries"] |= {name: version for name in _LIBRARIES if (version := _version(name))}
    machine["threads"] = threads or usable_processors()
    machine["load_average"] = {"before": load_before, "after": load_average()}
    return {
        "report": f"ddpm-bench {context.info_name}",
        "report_version": 1,
        "question": question,
        "known_unfairness": known_unfairness,
        "command": command_line(context),
        "environment": machine,
        "cases": [],
    }


def load_average() -> tuple[float, float, float] | None:
    """Processes that wanted to run over 1, 5 and 15 minutes; None where it is not known."""
    try:
        one, five, fifteen = (round(load, 2) for load in os.getloadavg())
        return one, five, fifteen
    except (AttributeError, OSError):
        return None


def timed_case(case_id: str, timed: Timed, name: str, **more: Any) -> Case:
    """A case from what was timed under ``name``.

    Args:
        case_id: stable, ``report/what/how``.
        timed: the rounds.
        name: of the case in them.
        **more: further fields.
    """
    samples = timed.samples_ms[name]
    return {
        "id": case_id,
        "unit": "ms",
        **more,
        "summary": summarise(samples),
        "warm_up": timed.warm_up,
        "samples": samples,
        CONTROL: timed.samples_ms[CONTROL],
    }


def sampled_case(case_id: str, samples: list[float], unit: str = "ms", **more: Any) -> Case:
    """A case from samples that were taken some other way."""
    return {"id": case_id, "unit": unit, **more, "summary": summarise(samples), "samples": samples}


def print_cases(cases: list[Case], unit: str = "ms") -> None:
    """Percentiles of every timed case, a row each."""
    header = ("case", "p50", "p90", "p95", "p99", "min", "n")
    rows = [header]
    for case in cases:
        summary = case["summary"]
        numbers = tuple(f"{summary[key]:.3f}" for key in header[1:-1])
        rows.append((case["id"], *numbers, f"{summary['n']:.0f}"))
    click.echo(f"\n{unit}:")
    print_rows(rows)


def finish(report: dict[str, Any], json_path: Path | None) -> None:
    """Say what it was made with, and write it where asked."""
    click.echo()
    for unfair in report["known_unfairness"]:
        click.echo(f"note: {unfair}")
    print_machine(report)
    load = report["environment"]["load_average"]
    click.echo(f"{report['environment']['threads']} threads; load average {load}")
    if json_path is not None:
        write_json(json_path, report)
        click.echo(f"wrote {json_path.name}", err=True)


def read_report(path: Path) -> dict[str, Any]:
    """Read a speed report and check its shape.

    Raises:
        ConfigurationError: no such file, or not a report of this kind.
    """
    try:
        if path.stat().st_size > _MAX_REPORT_BYTES:
            raise ConfigurationError(f"{path.name} is too large for a report.")
        raw = path.read_bytes()
        msgspec.json.decode(raw, type=_Report)
        report: dict[str, Any] = json.loads(raw)
    except OSError as error:
        raise ConfigurationError(f"{path.name} cannot be read: {error.strerror}.") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{path.name} is not a speed report of ddpm-bench: {error}. "
            "Make one with: ddpm-bench latency --json FILE"
        ) from error
    return report


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
