"""Curves for people, where matplotlib is installed; nothing else here imports it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.errors import ConfigurationError, missing_extra

from .report import check_folder

__all__ = ["check_plot", "plot_likelihood", "plot_quality"]

_SUFFIXES = (".pdf", ".png", ".svg")


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be written, before any work is done; None is no plot.

    Raises:
        ConfigurationError: a suffix that is not a picture's.
        OSError: its folder is missing, or may not be written to.
        BackendUnavailableError: matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix not in _SUFFIXES:
        raise ConfigurationError(
            f"cannot plot to {path.name!r}; use a name that ends in {', '.join(_SUFFIXES)}."
        )
    check_folder(path)
    _figure_class()


def plot_quality(path: Path, report: dict[str, Any]) -> None:
    """Fréchet distance and KID over network evaluations, a line a sampler, floors dashed.

    Args:
        path: destination.
        report: of ``ddpm-bench quality`` on an engine.
    """
    figure = _figure_class()(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots(1, 2)
    cases = [case for case in report["cases"] if "evaluations" in case["source"]]
    ways: dict[str, list[dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda case: case["source"]["evaluations"]):
        name = f"{case['source']['sampler']}, {case['source']['spacing']}"
        ways.setdefault(name, []).append(case)
    for i, (name, points) in enumerate(sorted(ways.items())):
        evaluations = [case["source"]["evaluations"] for case in points]
        style = {"color": f"C{i % 10}", "marker": "osv^D"[i // 10 % 5], "markersize": 4}
        axes[0].plot(evaluations, [case["frechet"] for case in points], label=name, **style)
        axes[1].plot(evaluations, [1000 * case["kid"]["mean"] for case in points], **style)
    for floor in report["floors"]:
        style = {"linestyle": "--" if floor["name"] == "train" else ":", "color": "grey"}
        axes[0].axhline(floor["frechet"], label=f"real images ({floor['name']})", **style)
        axes[1].axhline(1000 * floor["kid"], **style)
    counts: list[int] = []
    for count in sorted({case["source"]["evaluations"] for case in cases}, reverse=True):
        if not counts or count < 0.85 * counts[-1]:  # room for its label
            counts.append(count)
    for axis, name in zip(axes, ("Fréchet distance", "KID × 1000"), strict=True):
        axis.set(xlabel="network evaluations an image", ylabel=name, xscale="log")
        axis.set_xticks(counts, map(str, counts))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[1].set_yscale("symlog", linthresh=1.0)  # a KID may be negative
    axes[1].set_ylim(bottom=-1.0)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, path)


def plot_likelihood(path: Path, report: dict[str, Any]) -> None:
    """Every term of the bound over its timestep, a line a split.

    Args:
        path: destination.
        report: of ``ddpm-bench likelihood``.
    """
    figure = _figure_class()(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    for case in report["cases"]:
        label = f"{case['split']}: {case['bits_per_dimension']:.3f} bits/dim in all"
        pairs = zip(case["timesteps"], case["terms"], strict=True)
        visited = [(t + 1, term) for t, term in pairs if term is not None]
        axis.plot(*zip(*visited, strict=True), ".-", label=label, linewidth=0.8, markersize=3)
    axis.set(
        xlabel="timestep t + 1", ylabel="bits/dim of the term at t", xscale="log", yscale="log"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", "plot a report", "bench") from error
    return Figure


def _save(figure: Any, path: Path) -> None:
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], dpi=150)
    with atomic_file(path) as file:
        file.write(drawn.getvalue())
