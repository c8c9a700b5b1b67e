"""ddpm-bench results: measure everything, one report after another, and write the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.errors import BackendError, ConfigurationError

from .plots import plot_quality
from .quality_page import merged_reports, quality_section
from .results_page import TABLES, results_page
from .speed_report import read_report

__all__ = ["results_command"]

_PLAN: dict[str, tuple[str, ...]] = {
    "peers-fashion-mnist": ("peers", "--network", "fashion-mnist"),
    "peers-cifar-10": ("peers", "--network", "cifar-10", "--rounds", "12"),
    "whole": ("whole",),
    "latency": ("latency",),
    "throughput": ("throughput",),
    "startup": ("startup",),
    "startup-openvino": ("startup", "--backend", "openvino"),
    "memory": ("memory",),
    "roofline": ("roofline",),
    "profile": ("profile",),
}


@click.command("results")
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Reports, NAME.json each."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page (.md).")
@click.option("--measure", is_flag=True, help="Make the reports first: about 15 minutes.")
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="To measure.")
def results_command(folder: Path, out: Path, measure: bool, engine_path: Path | None) -> None:
    """Write every report of a folder to one Markdown page; with --measure, make them first."""
    if measure:
        if engine_path is None:
            raise ConfigurationError("--measure needs an engine bundle; give --engine.")
        folder.mkdir(parents=True, exist_ok=True)
        for name, words in _PLAN.items():
            _run(name, words, folder, engine_path)
    order = list(_PLAN)
    found = sorted(
        folder.glob("*.json"),
        key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem),
    )
    if not found:
        raise ConfigurationError(
            f"no reports in {folder.name}; make them with: ddpm-bench results --measure"
        )
    reports = [read_report(path) for path in found if _kind(path) in ("", *TABLES)]
    qualities = [json.loads(path.read_bytes()) for path in found if _kind(path) == "quality"]
    page = results_page(reports) + _quality(qualities, folder, out)
    with atomic_file(out) as file:
        file.write(page.encode())
    click.echo(f"{len(reports)} reports on {out.name}")


def _quality(reports: list[Any], folder: Path, out: Path) -> str:
    """The tables of quality; the largest is plotted too, beside the reports."""
    sections = []
    for merged in merged_reports(reports):
        plot = None
        if not sections and len(merged["cases"]) > 1:
            picture = folder / "quality.png"
            plot_quality(picture, merged)
            plot = os.path.relpath(picture, out.parent)
        sections.append(quality_section(merged, plot))
    return "\n".join(["", *sections]) if sections else ""


def _kind(path: Path) -> str:
    """What a file reports: "latency", "quality", …; "" when it cannot be told."""
    try:
        kind = json.loads(path.read_bytes()).get("report", "")
    except (ValueError, AttributeError):
        return ""  # read_report says what is wrong with it
    return str(kind).removeprefix("ddpm-bench ")


def _run(name: str, words: tuple[str, ...], folder: Path, engine_path: Path) -> None:
    """One sub-command in a process of its own, so that none inherits another's threads."""
    click.echo(f"measuring {name}", err=True)
    engine = () if words[0] == "peers" else ("--engine", str(engine_path))
    done = subprocess.run(  # noqa: S603  # this interpreter, our own commands
        [sys.executable, "-m", "ddpm_bench", *words, *engine, "--json", folder / f"{name}.json"],
        check=False,
        stdout=sys.stderr,
    )
    if done.returncode != 0:
        raise BackendError(f"ddpm-bench {words[0]} failed; see above.")
