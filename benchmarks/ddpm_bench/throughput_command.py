"""ddpm-bench throughput: images and network evaluations a second, and where it saturates."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .plots import check_plot
from .report import print_rows
from .speed_options import check_positive, engine_options, json_option, plot_option
from .speed_plots import plot_throughput
from .speed_report import Case, finish, load_average, make_report, timed_case
from .stepping import Stepper, open_split, program_for, step_label
from .timing import interleave

__all__ = ["saturation", "throughput_command"]

_QUESTION = "How many images a second, at which batch size, and from where does more not help?"
_UNFAIR = [
    "images a second follow from steps a second: what is done once an image is in 'latency'",
    "median rates; a machine that is shared gives less",
]
_NEAR = 0.95  # of the best rate


@click.command("throughput")
@engine_options
@click.option("--sampler", default="ddim", help="Which steps.")
@click.option("--steps", default=50, help="Steps an image, for images a second.")
@click.option(
    "--batch-size",
    "batch_sizes",
    type=int,
    multiple=True,
    default=(1, 2, 4, 8, 16, 32, 64, 128),
)
@click.option("--rounds", default=20, help="Timed steps of each batch size, at most.")
@click.option("--warm-up", default=2, help="Steps before the first that counts.")
@click.option("--budget-s", default=60.0, help="Begin no round after so many seconds.")
@json_option
@plot_option
@click.pass_context
def throughput_command(
    context: click.Context, /, engine_path: Path, sampler: str, steps: int,
    batch_sizes: tuple[int, ...], rounds: int, warm_up: int, budget_s: float,
    json_path: Path | None, plot_path: Path | None, precision: str, **options: Any,
) -> None:  # fmt: skip
    """Count network evaluations and images a second against batch size."""
    check_positive(batch_size=batch_sizes, rounds=rounds, warm_up=warm_up, steps=steps)
    check_plot(plot_path)
    load = load_average()
    bundle, backend = open_split(engine_path, precision=precision, **options)
    click.echo(f"{bundle.manifest.name}: {backend.description}", err=True)
    label = step_label(backend, precision, bundle)
    program = program_for(bundle, sampler, steps)
    steppers = {
        f"batch-{batch}": Stepper(backend, program, batch) for batch in sorted(set(batch_sizes))
    }
    with tqdm(total=rounds, unit=" rounds", file=sys.stderr) as bar:
        timed = interleave(
            steppers, rounds=rounds, warm_up=warm_up, budget_s=budget_s, on_round=bar.update
        )
    cases = []
    for name in steppers:
        batch = int(name.removeprefix("batch-"))
        case = timed_case(f"throughput/{label}/{sampler}/{name}", timed, name, batch_size=batch)
        rate = 1e3 * batch / case["summary"]["p50"]
        case |= {"evaluations_per_s": rate, "images_per_s": rate / len(program)}
        cases.append(case)
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=options["threads"],
        load_before=load,
    )
    report["engine"] = {"name": bundle.manifest.name, "backend": backend.description}
    report["cases"], report["saturation_batch_size"] = cases, saturation(cases)
    rows = [("batch size", "evaluations/s", f"images/s ({steps} steps)", "ms a step")]
    rows += [
        (
            str(case["batch_size"]),
            f"{case['evaluations_per_s']:.1f}",
            f"{case['images_per_s']:.2f}",
            f"{case['summary']['p50']:.2f}",
        )
        for case in cases
    ]
    print_rows(rows)
    click.echo(f"\nwithin 5 % of the best from batch size {report['saturation_batch_size']}")
    finish(report, json_path)
    if plot_path is not None:
        plot_throughput(plot_path, report)


def saturation(cases: list[Case]) -> int:
    """The smallest batch size within five per cent of the best rate."""
    best = max(case["evaluations_per_s"] for case in cases)
    saturated: int = min(c["batch_size"] for c in cases if c["evaluations_per_s"] >= _NEAR * best)
    return saturated
