"""ddpm-bench results: measure everything, one report after another, and write the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
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

_CACHED, _CIFAR_10 = "cached", "cifar-10"

# the name of a report: what is measured, and the command; no subject where a command has its own
_PLAN: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "peers-fashion-mnist": (None, ("peers", "--network", "fashion-mnist")),
    "peers-cifar-10": (None, ("peers", "--network", "cifar-10", "--rounds", "12")),
    "whole": ("engine", ("whole",)),
    "latency": ("engine", ("latency",)),
    "throughput": ("engine", ("throughput",)),
    "startup": ("engine", ("startup",)),
    "startup-openvino": ("engine", ("startup", "--backend", "openvino")),
    "memory": ("engine", ("memory",)),
    "roofline": ("engine", ("roofline",)),
    "roofline-cifar-10": (
        _CIFAR_10,
        ("roofline", "--precision", "bf16", "--batch-size", "1", "--batch-size", "8"),
    ),
    "profile": ("engine", ("profile",)),
    "step-cache": (_CACHED, ("step-cache", "--num-images", "1000")),
}


@click.command("results")
@click.option(
    "--folder", required=True, type=click.Path(path_type=Path), help="Reports, NAME.json each."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page (.md).")
@click.option("--measure", is_flag=True, help="Make the reports first: about 25 minutes.")
@click.option("--only", multiple=True, type=click.Choice(list(_PLAN)), help="Measure these.")
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="To measure.")
@click.option("--data", type=click.Path(path_type=Path), help="To judge step caching with.")
def results_command(
    folder: Path, out: Path, measure: bool, only: tuple[str, ...], engine_path: Path | None,
    data: Path | None,
) -> None:  # fmt: skip
    """Write every report of a folder to one Markdown page; with --measure, make them first."""
    if measure:
        if engine_path is None:
            raise ConfigurationError("--measure needs an engine bundle; give --engine.")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ddpm-bench-") as scratch:
            for name in only or _PLAN:
                subject, words = _PLAN[name]
                if subject is not None:
                    words += ("--engine", str(_subject(subject, engine_path, Path(scratch))))
                if subject == _CACHED and data is not None:
                    words += ("--data", str(data))
                _run(name, words, folder)
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


def _subject(name: str, engine_path: Path, scratch: Path) -> Path:
    """The engine that is measured: the one given, its form with a step cache, or a large one."""
    path = scratch / f"{name}.engine"
    if name == _CACHED and not path.exists():
        from ddpm_export.again import bundle_from_engine

        bundle_from_engine(engine_path, path, step_cache=1)
    if name == _CIFAR_10 and not path.exists():
        from .peer_networks import NETWORKS, make_bundle, make_network

        made = make_bundle(make_network(NETWORKS[name]), NETWORKS[name], name)
        shutil.move(made, path)
        made.parent.rmdir()
    return path if name in (_CACHED, _CIFAR_10) else engine_path


def _run(name: str, words: tuple[str, ...], folder: Path) -> None:
    """One sub-command in a process of its own, so that none inherits another's threads."""
    click.echo(f"measuring {name}", err=True)
    done = subprocess.run(  # noqa: S603  # this interpreter, our own commands
        [sys.executable, "-m", "ddpm_bench", *words, "--json", folder / f"{name}.json"],
        check=False,
        stdout=sys.stderr,
    )
    if done.returncode != 0:
        raise BackendError(f"ddpm-bench {words[0]} failed; see above.")
