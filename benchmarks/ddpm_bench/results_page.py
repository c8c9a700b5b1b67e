"""Speed reports as one Markdown page: a table a report, and under it the command that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .step_cache_command import table

__all__ = ["TABLES", "results_page"]

Report = dict[str, Any]
Rows = list[tuple[str, ...]]

_HEAD = """# Speed, measured

Every table was made by the command under it, on the machine named there; the reports with all raw
samples are in [`results/`](results). Times are medians unless a column says otherwise, and cases of
one table were interleaved in one run. A load average above the number of processors means that
other work shared the machine: then only ratios within a table mean something.
Made by `ddpm-bench results`; do not edit.
"""


def results_page(reports: list[Report]) -> str:
    """The page.

    Args:
        reports: speed reports, in the order in which they are to stand.
    """
    return "\n".join([_HEAD, _machine(reports), *(_section(report) for report in reports)])


def _machine(reports: list[Report]) -> str:
    """On what: each machine that occurs, once."""
    lines = []
    for report in reports:
        machine = report["environment"]
        processor = machine["processor"]
        libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
        line = (
            f"{processor['model']}, {machine['threads']} of {processor['usable']} usable "
            f"processors ({' '.join(processor['instruction_sets'])}), {machine['system']}, "
            f"Python {machine['python']}, {libraries}."
        )
        if line not in lines:
            lines.append(line)
    return "**Machine.** " + "  \n".join(lines) + "\n"


def _section(report: Report) -> str:
    kind = report["report"].removeprefix("ddpm-bench ")
    subject = report.get("network") or report.get("engine", {}).get("name", "")
    backend = report.get("engine", {}).get("backend")
    load = report["environment"]["load_average"]["before"]
    commit = (report["environment"]["commit"] or "-")[:12]
    busy = f"; load average before it began: {load[0]}" if load else ""
    parts = [
        f"## {kind}: {subject}\n",
        report["question"] + "\n",
        *([f"{backend}\n"] if backend else []),
        TABLES[kind](report),
        *(f"- {unfair}" for unfair in report["known_unfairness"]),
        f"\n`{report['command']}` at commit `{commit}`{busy}",
        "",
    ]
    return "\n".join(parts)


def _table(rows: Rows) -> str:
    head, *body = rows
    rule = ("---",) + ("---:",) * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body)) + "\n"


def _latency(report: Report) -> str:
    rows: Rows = [("case", "p50 ms", "p90", "p95", "p99", "ms an image", "around the network")]
    for case in report["cases"]:
        summary = case["summary"]
        step = case["kind"] == "step"
        rows.append(
            (
                case["id"],
                *(f"{summary[key]:.2f}" for key in ("p50", "p90", "p95", "p99")),
                f"{case['image_ms']:.3f}" if step else f"{summary['p50']:.1f}",
                f"{1e3 * case['ours_ms']:.0f} µs ({case['ours_share']:.2%})" if step else "",
            )
        )
    return _table(rows)


def _throughput(report: Report) -> str:
    rows: Rows = [("batch size", "evaluations/s", "images/s", "ms a step")]
    for case in report["cases"]:
        rows.append(
            (
                str(case["batch_size"]),
                f"{case['evaluations_per_s']:.1f}",
                f"{case['images_per_s']:.2f}",
                f"{case['summary']['p50']:.2f}",
            )
        )
    return (
        _table(rows)
        + f"\nWithin 5 % of the best from batch size {report['saturation_batch_size']}.\n"
    )


def _startup(report: Report) -> str:
    found: dict[str, dict[str, str]] = {}
    for case in report["cases"]:
        kind, part = case["id"].split("/")[-2:]
        found.setdefault(part, {})[kind] = f"{case['summary']['p50']:.0f}"
    rows: Rows = [("part", "cold ms", "warm ms")]
    rows += [
        (part.removesuffix("_ms"), kinds["cold"], kinds["warm"]) for part, kinds in found.items()
    ]
    return _table(rows) + f"\nWarm over cold, whole process: {report['warm_over_cold']:.2f}.\n"


def _memory(report: Report) -> str:
    stages = list(dict.fromkeys(case["stage"] for case in report["cases"]))
    found: dict[int, list[str]] = {}
    for case in report["cases"]:
        found.setdefault(case["batch_size"], []).append(f"{case['summary']['p50']:.0f}")
    rows: Rows = [("peak MiB after", *stages)]
    rows += [(f"batch {batch}", *peaks) for batch, peaks in found.items()]
    return _table(rows)


def _roofline(report: Report) -> str:
    rows: Rows = [("case", "ms a step", "GFLOP", "FLOP/byte", "GFLOP/s", "of the limit")]
    for case in report["cases"]:
        rows.append(
            (
                case["id"],
                f"{case['summary']['p50']:.2f}",
                f"{case['product_flops'] / 1e9:.3f}",
                f"{case['flops_per_byte']:.0f}",
                f"{case['gflops']:.0f}",
                f"{case['fraction']:.1%}",
            )
        )
    rates = report["machine"]["matmul_gflops"].items()
    limits = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates)
    copy = report["machine"]["copy_gb_per_s"]
    return f"Matrix products on this machine: {limits}; copy {copy:.1f} GB/s.\n\n" + _table(rows)


def _peers(report: Report) -> str:
    ours = list(
        dict.fromkeys(
            case["id"].rsplit("/", 1)[1] for case in report["cases"] if "/ours-" in case["id"]
        )
    )
    rows: Rows = [("batch", "way", "p50 ms", "p95", *(f"over {one}" for one in ours), "what")]
    for case in report["cases"]:
        cells = []
        for one in ours:
            found = case["over"].get(one)
            cells.append(
                f"{found['p50']:.2f} ({found['p5']:.2f}–{found['p95']:.2f})" if found else "1"
            )
        summary = case["summary"]
        name = case["id"].rsplit("/", 1)[1]
        numbers = (f"{summary['p50']:.2f}", f"{summary['p95']:.2f}")
        rows.append((str(case["batch_size"]), name, *numbers, *cells, case["note"]))
    return _table(rows)


def _profile(report: Report) -> str:
    parts = list(report["cases"][0]["parts_us"])
    rows: Rows = [("µs a step", *parts, "all of ours")]
    for case in report["cases"]:
        values = case["parts_us"]
        ours = sum(values.values()) - values["network"]
        share = ours / sum(values.values())
        name = "/".join(case["id"].split("/")[2:])
        rows.append((name, *(f"{values[part]:.0f}" for part in parts), f"{ours:.0f} ({share:.2%})"))
    return _table(rows)


def _whole(report: Report) -> str:
    rows: Rows = [("way", "p50 s", "min", "max", "times ours")]
    for case in report["cases"]:
        samples = case["samples"]
        rows.append(
            (
                case["id"].rsplit("/", 1)[1],
                f"{case['summary']['p50']:.2f}",
                f"{min(samples):.2f}",
                f"{max(samples):.2f}",
                f"{case['over_ours']:.2f}",
            )
        )
    return _table(rows)


def _step_cache(report: Report) -> str:
    return _table(table(report["cases"]))


TABLES: dict[str, Callable[[Report], str]] = {
    "latency": _latency,
    "throughput": _throughput,
    "startup": _startup,
    "memory": _memory,
    "roofline": _roofline,
    "peers": _peers,
    "profile": _profile,
    "whole": _whole,
    "step-cache": _step_cache,
}
