"""ddpm-bench latency: how long one step takes, by batch size, and one image from end to end."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ddpm_runtime.bundle import Bundle

from .plots import check_plot
from .speed_options import check_positive, engine_options, json_option, plot_option
from .speed_plots import plot_latency
from .speed_report import Case, finish, load_average, make_report, print_cases, timed_case
from .stepping import SplitBackend, Stepper, open_split, program_for, step_label
from .timing import Timed, interleave

__all__ = ["latency_command", "step_cases"]

_QUESTION = "How long does one step of a batch take, and how much of it is the network?"
_UNFAIR = [
    "all lanes run the same program in step; lanes that differ share one evaluation too",
    "the image is timed without writing a file",
]


@click.command("latency")
@engine_options
@click.option("--sampler", default="ddim", help="Which steps.")
@click.option("--steps", default=50, help="Steps of the image that is timed end to end.")
@click.option(
    "--batch-size", "batch_sizes", type=int, multiple=True, default=(1, 2, 4, 8, 16, 32, 64)
)
@click.option("--rounds", default=50, help="Timed steps of each batch size, at most.")
@click.option("--warm-up", default=3, help="Steps before the first that counts.")
@click.option("--budget-s", default=60.0, help="Begin no round after so many seconds.")
@json_option
@plot_option
@click.pass_context
def latency_command(
    context: click.Context, /, engine_path: Path, sampler: str, steps: int,
    batch_sizes: tuple[int, ...], rounds: int, warm_up: int, budget_s: float,
    json_path: Path | None, plot_path: Path | None, precision: str, **options: Any,
) -> None:  # fmt: skip
    """Time single steps, batch sizes interleaved, and single images."""
    check_positive(batch_size=batch_sizes, rounds=rounds, warm_up=warm_up, steps=steps)
    check_plot(plot_path)
    load = load_average()
    bundle, backend = open_split(engine_path, precision=precision, **options)
    click.echo(f"{bundle.manifest.name}: {backend.description}", err=True)
    label = step_label(backend, precision, bundle)
    program = program_for(bundle, sampler, steps)
    steppers = {batch: Stepper(backend, program, batch) for batch in sorted(set(batch_sizes))}
    timed, network_s = _time_steps(backend, steppers, rounds, warm_up, budget_s)
    cases = step_cases(timed, network_s, label, sampler)
    cases.append(_image_case(backend, bundle, label, sampler, steps, min(rounds, 20)))
    report = make_report(
        context,
        question=_QUESTION,
        known_unfairness=_UNFAIR,
        threads=options["threads"],
        load_before=load,
    )
    report["engine"] = {"name": bundle.manifest.name, "backend": backend.description}
    report["cases"] = cases
    print_cases(cases)
    _print_shares(cases)
    finish(report, json_path)
    if plot_path is not None:
        plot_latency(plot_path, report)


def _time_steps(
    backend: SplitBackend, steppers: dict[int, Stepper], rounds: int, warm_up: int, budget_s: float
) -> tuple[Timed, dict[int, list[float]]]:
    """Interleaved steps; beside each, the milliseconds that the network took of it."""
    network_ms: dict[int, list[float]] = {batch: [] for batch in steppers}

    def timed_step(batch: int) -> None:
        before = backend.network_s
        steppers[batch]()
        network_ms[batch].append(1e3 * (backend.network_s - before))

    with tqdm(total=rounds, unit=" rounds", file=sys.stderr) as bar:
        timed = interleave(
            {f"batch-{batch}": partial(timed_step, batch) for batch in steppers},
            rounds=rounds,
            warm_up=warm_up,
            budget_s=budget_s,
            on_round=bar.update,
        )
    return timed, {batch: values[warm_up:] for batch, values in network_ms.items()}


def step_cases(
    timed: Timed, network_ms: dict[int, list[float]], label: str, sampler: str
) -> list[Case]:
    """A case for each batch size, with the network's share."""
    cases = []
    for batch, network in network_ms.items():
        case = timed_case(
            f"step/{label}/{sampler}/batch-{batch}",
            timed,
            f"batch-{batch}",
            kind="step",
            batch_size=batch,
            network_samples=network,
        )
        ours = sorted(
            whole - inside for whole, inside in zip(case["samples"], network, strict=True)
        )
        case["ours_ms"] = ours[len(ours) // 2]
        case["ours_share"] = case["ours_ms"] / case["summary"]["p50"]
        case["image_ms"] = case["summary"]["p50"] / batch
        cases.append(case)
    return cases


def _image_case(
    backend: SplitBackend, bundle: Bundle, label: str, sampler: str, steps: int, rounds: int
) -> Case:
    """Whole images, one at a time."""
    stepper = Stepper(backend, program_for(bundle, sampler, steps), 1)

    def image() -> None:
        stepper()
        while stepper.lanes.active:
            stepper()

    image()  # ends whatever was begun
    timed = interleave({"image": image}, rounds=rounds, warm_up=1, budget_s=30.0)
    return timed_case(
        f"image/{label}/{sampler}-{steps}", timed, "image", kind="image", batch_size=1, steps=steps
    )


def _print_shares(cases: list[Case]) -> None:
    click.echo()
    for case in cases:
        if case["kind"] == "step":
            click.echo(
                f"batch {case['batch_size']:>3}: {case['image_ms']:.3f} ms an image and step; "
                f"around the network {1e3 * case['ours_ms']:.0f} µs, {case['ours_share']:.2%}"
            )
