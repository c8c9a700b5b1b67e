"""Reports of quality as tables: the scores of every case, over its network evaluations.

Reports of the same judge, network, guidance and number of images belong in one table: a sweep may
be measured in parts.
"""

from __future__ import annotations

from typing import Any

__all__ = ["merged_reports", "quality_section"]

Report = dict[str, Any]

_HEAD = """## quality: {engine}, {n:,} images a case, {guidance}

{question}

| {names} |
| --- |{rules}
"""


def merged_reports(reports: list[Report]) -> list[Report]:
    """One report for each judge, network, number of images and guidance.

    Args:
        reports: of ``ddpm-bench quality`` on engines.

    Returns:
        Reports whose cases are all of one kind, and whose ``commands`` made them.
    """
    found: dict[tuple[Any, ...], Report] = {}
    for report in reports:
        for case in report["cases"]:
            source = case["source"]
            if "engine" not in source:
                continue
            key = (
                report["judge"]["sha256"],
                source["network_sha256"],
                source["guidance_scale"],
                case["n"],
            )
            merged = found.setdefault(key, {**report, "cases": [], "commands": []})
            merged["cases"].append(case)
            if report["command"] not in merged["commands"]:
                merged["commands"].append(report["command"])
    return sorted(found.values(), key=lambda merged: -len(merged["cases"]))


def quality_section(report: Report, plot: str | None = None) -> str:
    """A table with a line a sampler and a column an amount of network evaluations.

    Args:
        report: one of :func:`merged_reports`.
        plot: a picture of the same, to show under it.
    """
    first = report["cases"][0]
    guidance = first["source"]["guidance_scale"]
    by_way: dict[str, dict[int, Report]] = {}
    for case in report["cases"]:
        by_way.setdefault(_way(case["source"]), {})[case["source"]["evaluations"]] = case
    floors = {floor["name"]: floor for floor in report["floors"]}
    columns = sorted({count for cases in by_way.values() for count in cases}, key=int)
    names = ["Fréchet distance (KID × 1000)", *map(str, columns)]
    lines = [
        _HEAD.format(
            engine=first["source"]["engine"],
            n=first["n"],
            guidance="no guidance" if guidance == 1.0 else f"guidance {guidance:g}",
            question=report["question"],
            names=" | ".join(names),
            rules=" ---: |" * len(columns),
        ).rstrip("\n")
    ]
    for way, cases in by_way.items():
        cells = (_cell(cases[count]) if count in cases else "" for count in columns)
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    lines.append("")
    for name, floor in floors.items():
        lines.append(
            f"- real images ({name}), {floor['n']:,} against {floor['against']:,}: Fréchet "
            f"{floor['frechet']:.4f} ± {floor['frechet_deviation'] or 0:.4f}, KID × 1000 "
            f"{1e3 * floor['kid']:.2f} ± {1e3 * (floor['kid_deviation'] or 0):.2f}"
        )
    lines += [f"- {unfair}" for unfair in report["known_unfairness"]]
    if plot is not None:
        lines.append(f"\n![Quality over network evaluations]({plot})")
    lines += ["", *(f"`{command}`  " for command in report["commands"]), ""]
    return "\n".join(lines)


def _way(source: Report) -> str:
    """The sampler, its spacing, and what is unusual about how it was run."""
    words = [str(source["sampler"]), str(source["spacing"])]
    if source.get("cache_interval", 1) != 1:
        words.append(f"cache interval {source['cache_interval']}")
    if "bf16" in source["backend"]:
        words.append("bf16")
    if "OpenVINO" in source["backend"]:
        words.append("OpenVINO")
    return ", ".join(words)


def _cell(case: Report) -> str:
    return f"{case['frechet']:.3f} ({1e3 * case['kid']['mean']:.2f})"
