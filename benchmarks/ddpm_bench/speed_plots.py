"""Curves of the speed reports, where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plots import _figure_class, _save

__all__ = ["plot_latency", "plot_roofline", "plot_throughput"]


def plot_latency(path: Path, report: dict[str, Any]) -> None:
    """Milliseconds an image and step over batch size: median, 5th to 95th percentile."""
    cases = [case for case in report["cases"] if case["kind"] == "step"]
    figure = _figure_class()(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    batches = [case["batch_size"] for case in cases]
    for key, style in (("min", ":"), ("p50", "o-"), ("p95", "--")):
        values = [case["summary"][key] / case["batch_size"] for case in cases]
        axis.plot(batches, values, style, label=key)
    axis.set(xlabel="batch size", ylabel="ms an image and step", xscale="log")
    axis.set_ylim(bottom=0)
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)


def plot_throughput(path: Path, report: dict[str, Any]) -> None:
    """Network evaluations a second over batch size; the saturation point marked."""
    figure = _figure_class()(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    batches = [case["batch_size"] for case in report["cases"]]
    rates = [case["evaluations_per_s"] for case in report["cases"]]
    axis.plot(batches, rates, "o-")
    axis.axvline(report["saturation_batch_size"], linestyle="--", color="grey")
    axis.set(xlabel="batch size", ylabel="network evaluations a second", xscale="log")
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    _save(figure, path)


def plot_roofline(path: Path, report: dict[str, Any]) -> None:
    """The machine's two limits, and where the network stands under them."""
    figure = _figure_class()(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    machine = report["machine"]
    intensities = [2.0**power for power in range(-2, 13)]
    for precision, rate in machine["matmul_gflops"].items():
        roof = [min(rate, machine["copy_gb_per_s"] * one) for one in intensities]
        axis.plot(intensities, roof, "-", label=f"limit, {precision}", linewidth=1)
    for case in report["cases"]:
        axis.plot(case["flops_per_byte"], case["gflops"], "o", label=case["id"])
    axis.set(xlabel="FLOP a byte", ylabel="GFLOP/s", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(figure, path)
