"""The report of ``ddpm-bench gpu`` for people: on the screen and as Markdown."""

from __future__ import annotations

from typing import Any

import click

from .report import print_rows
from .speed_report import Case

__all__ = ["headline", "markdown", "print_tables"]

Report = dict[str, Any]
Rows = list[tuple[str, ...]]

_SPEED = (
    *("way", "ms a batch", "± mad", "images/s", "evaluations/s", "row ms", "device ms"),
    *("host gap", "MFU", "MB", "pixels off", "torch eager ÷", "torch compiled ÷"),
)
_SETUP = ("way", "open ms", "build ms", "load ms", "first batch ms", "steady image ms")


def print_tables(report: Report) -> None:
    """Everything on stdout."""
    click.echo(headline(report))
    for title, cases in _groups(report):
        click.echo(f"\n{title}")
        print_rows(_speed_rows(cases))
        click.echo("")
        print_rows(_setup_rows(cases))
    for line in _notes(report):
        click.echo(line)


def markdown(report: Report) -> str:
    """The same as a page."""
    parts = ["# Speed on the GPU\n", headline(report) + "\n"]
    for title, cases in _groups(report):
        parts += [f"## {title}\n", _table(_speed_rows(cases)), _table(_setup_rows(cases))]
    parts += [f"- {line}" for line in _notes(report)]
    parts += [f"- {unfair}" for unfair in report["known_unfairness"]]
    parts.append(f"\n`{report['command']}` at commit `{report['environment']['commit']}`\n")
    return "\n".join(parts)


def headline(report: Report) -> str:
    """Which backends ran on which GPU, and which are missing."""
    gpu = report["gpu"]
    ran = ", ".join(report["backends"]["ran"]) or "no backend"
    missing = "; ".join(f"{name}: {why}" for name, why in report["backends"]["missing"].items())
    driver = f"driver {gpu['driver']}, " if "driver" in gpu else ""
    return (
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, {driver}CUDA "
        f"{gpu['cuda']}): {ran}" + (f". Not here: {missing}" if missing else "")
    )


def _groups(report: Report) -> list[tuple[str, list[Case]]]:
    found: dict[tuple[str, int], list[Case]] = {}
    for case in report["cases"]:
        found.setdefault((case["network"], case["batch_size"]), []).append(case)
    backends = " and ".join(report["backends"]["ran"])
    return [
        (f"{network}, batch {batch}, {cases[0]['rows']} rows of DDIM ({backends})", cases)
        for (network, batch), cases in sorted(found.items())
    ]


def _speed_rows(cases: list[Case]) -> Rows:
    rows: Rows = [_SPEED]
    for case in cases:
        summary, off = case["summary"], case["pixels_from"]
        memory = case.get("device_memory_bytes")
        rows.append((
            case["way"],
            f"{summary['p50']:.3f}",
            f"{summary['mad']:.3f}",
            f"{case['images_per_s']:.1f}",
            f"{case['evaluations_per_s']:.0f}",
            _number(case.get("row_ms"), ".4f"),
            _number(case.get("device_row_ms"), ".4f"),
            _number(case.get("host_gap_share"), ".1%"),
            _number(case["mfu"], ".1%"),
            _number(memory and memory / 1e6, ".0f"),
            f"{off['mean_levels']:.2f} ({off['most_levels']:.0f})",
            _over(case, "eager"),
            _over(case, "compile"),
        ))  # fmt: skip
    return rows


def _setup_rows(cases: list[Case]) -> Rows:
    rows: Rows = [_SETUP]
    for case in cases:
        setup = case["setup"]
        times = [setup[key] for key in ("open_ms", "build_ms", "load_ms", "first_batch_ms")]
        steady = setup["steady_batch_ms"] / case["batch_size"]
        rows.append((case["way"], *(_number(one, ".0f") for one in times), f"{steady:.3f}"))
    return rows


def _over(case: Case, word: str) -> str:
    """How many times longer PyTorch takes, in the same precision where it was timed in it."""
    found = {name: one for name, one in case["over"].items() if word in name}
    same = [one for name, one in found.items() if name.endswith(case["precision"])]
    chosen = same or list(found.values())[-1:]
    if not chosen:
        return "—"
    one = chosen[0]
    return f"{one['p50']:.2f} ({one['p5']:.2f} to {one['p95']:.2f})"


def _notes(report: Report) -> list[str]:
    rates = report["gpu"]["matmul_gflops"]
    limit = (
        ", ".join(f"{name} {rate / 1e3:.1f}" for name, rate in rates.items()) + " TFLOP/s"
        if rates
        else f"not measured on {report['gpu']['name']}: {report['gpu']['matmul_not_measured']}"
    )
    notes = ["", f"matrix products, which MFU is a share of: {limit}"]
    backends = {case["way"]: case["backend"] for case in report["cases"]}
    notes += [f"{way}: {backend}" for way, backend in backends.items()]
    notes += [f"skipped: {one['id']}: {one['reason']}" for one in report["skipped"]]
    return notes


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)


def _table(rows: Rows) -> str:
    head, *body = rows
    rule = ("---",) + ("---:",) * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)) + "\n"
