"""ddpm-bench roofline: how near the network comes to what this machine can do at all."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.backends.processors import usable_processors
from ddpm_runtime.errors import missing_extra

from .plots import check_plot
from .report import print_rows
from .speed_options import check_positive, engine_options, json_option, plot_option
from .speed_plots import plot_roofline
from .speed_report import Case, finish, load_average, make_report, timed_case
from .stepping import Stepper, open_split, program_for, step_label
from .timing import interleave

__all__ = ["roofline_command"]

_QUESTION = "What fraction of this machine's own matrix-product rate does the network reach?"
_UNFAIR = [
    "operations are counted as direct convolutions: an implementation with Winograd may pass 100 %",
    "bytes are the least possible, not those that were moved",
    "the limit is the best of eight, the network's time a median",
    "the copy rate is of one thread",
]


@click.command("roofline")
@engine_options
@click.option("--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 8, 64))
@click.option("--rounds", default=20, help="Timed steps of each batch size, at most.")
@click.option("--budget-s", default=60.0, help="Begin no round after so many seconds.")
@json_option
@plot_option
@click.pass_context
def roofline_command(
    context: click.Context, /, engine_path: Path, batch_sizes: tuple[int, ...], rounds: int,
    budget_s: float, json_path: Path | None, plot_path: Path | None, precision: str,
    **options: Any,
) -> None:  # fmt: skip
    """Measure this machine's limits, count the network's work, and divide."""
    check_positive(batch_size=batch_sizes, rounds=rounds)
    check_plot(plot_path)
    try:
        from .graph_cost import count_graph
    except ImportError as error:
        raise missing_extra("onnx", "count a network's work", "export") from error
    from .machine_rates import copy_gb_per_s, matmul_gflops

    load = load_average()
    threads = options["threads"] or usable_processors()
    bundle, backend = open_split(engine_path, precision=precision, **options)
    label = step_label(backend, precision, bundle)
    program = program_for(bundle, "ddim")
    steppers = {
        f"batch-{batch}": Stepper(backend, program, batch) for batch in sorted(set(batch_sizes))
    }
    # the machine before and after: a limit that moved meanwhile says that the machine was shared
    before = matmul_gflops(threads)
    timed = interleave(steppers, rounds=rounds, budget_s=budget_s)
    after = matmul_gflops(threads)
    rates = {name: max(rate, after[name]) for name, rate in before.items()}
    limit = rates.get("bf16" if label.endswith("bf16") else "fp32", rates["fp32"])
    cases = []
    for name in steppers:
        cost = count_graph(bundle.network_bytes, int(name.removeprefix("batch-")))
        case = timed_case(f"roofline/{label}/{name}", timed, name, **asdict(cost))
        case["flops_per_byte"] = cost.flops_per_byte
        case["gflops"] = cost.product_flops / case["summary"]["p50"] / 1e6
        case["fraction"] = case["gflops"] / limit
        cases.append(case)
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=options["threads"],
        load_before=load,
    )
    report["engine"] = {"name": bundle.manifest.name, "backend": backend.description}
    report["machine"] = {"matmul_gflops": rates, "copy_gb_per_s": copy_gb_per_s()}
    report["machine"]["matmul_gflops_before_and_after"] = [before, after]
    report["cases"] = cases
    _print(cases, report["machine"])
    finish(report, json_path)
    if plot_path is not None:
        plot_roofline(plot_path, report)


def _print(cases: list[Case], machine: dict[str, Any]) -> None:
    for name, rate in machine["matmul_gflops"].items():
        click.echo(f"matrix product {name}: {rate:.0f} GFLOP/s")
    click.echo(f"copy: {machine['copy_gb_per_s']:.1f} GB/s\n")
    rows = [("case", "ms a step", "GFLOP", "MB", "FLOP/byte", "GFLOP/s", "of the limit")]
    rows += [
        (
            case["id"],
            f"{case['summary']['p50']:.2f}",
            f"{case['product_flops'] / 1e9:.3f}",
            f"{case['traffic_bytes'] / 1e6:.1f}",
            f"{case['flops_per_byte']:.0f}",
            f"{case['gflops']:.0f}",
            f"{case['fraction']:.1%}",
        )
        for case in cases
    ]
    print_rows(rows)
    if cases[0]["uncounted"]:
        click.echo(f"not counted: {', '.join(cases[0]['uncounted'])}")
