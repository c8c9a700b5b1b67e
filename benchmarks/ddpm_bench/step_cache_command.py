"""ddpm-bench step-cache: what keeping deep features saves, and what it costs, side by side."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from ddpm_runtime import Engine

from .data import read_real_images
from .drawing import draw
from .judge import IMAGE_SHAPE, Judge
from .quality import Quality, Reference
from .report import print_rows
from .speed_options import check_positive, json_option
from .speed_report import Case, finish, load_average, make_report, timed_case
from .timing import interleave, ratio

__all__ = ["step_cache_command"]

_QUESTION = "How much faster are images from kept deep features, and how much worse?"
_UNFAIR = [
    "the judge knows Fashion-MNIST only; both distances depend on it",
    "the Fréchet distance is biased by n; compare it only within this table",
    "speeds are of whole batches, the sampler's own arithmetic and the copy to pixels included",
]


@click.command("step-cache")
@click.option(
    "--engine",
    "engine_path",
    required=True,
    type=click.Path(path_type=Path),
    help="An engine exported with --step-cache.",
)
@click.option(
    "--data", type=click.Path(path_type=Path), help="Held-out images, to judge; none: speed alone."
)
@click.option("--interval", "intervals", type=int, multiple=True, default=(1, 2, 3))
@click.option("--sampler", default="ddim", help="With its own defaults.")
@click.option("--steps", default=50, help="Steps an image.")
@click.option("--batch-size", default=16, help="Images that are timed together.")
@click.option("--rounds", default=8, help="Timed batches of each interval.")
@click.option("-n", "--num-images", "n", default=2000, help="Images to judge for each interval.")
@click.option("--threads", type=int, default=None, help="[default: usable processors]")
@json_option
@click.pass_context
def step_cache_command(
    context: click.Context, /, engine_path: Path, data: Path | None, intervals: tuple[int, ...],
    sampler: str, steps: int, batch_size: int, rounds: int, n: int, threads: int | None,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Time and judge the same images with the whole network every so many evaluations.

    No guidance, classes in turn. Ratios are taken round by round against every evaluation whole.
    """
    check_positive(interval=intervals, steps=steps, batch_size=batch_size, rounds=rounds, n=n)
    load = load_average()
    asked = sorted({1, *intervals})
    with Engine.load(engine_path, device="cpu", threads=threads) as engine:
        click.echo(f"{engine.manifest.name}: {engine.description}", err=True)
        classes = engine.manifest.network.num_classes
        label = "all" if classes else None
        settings: dict[str, Any] = {"sampler": sampler, "steps": steps, "guidance_scale": 1.0}
        for interval in asked:  # refuse the last before timing the first
            engine.program(sampler=sampler, steps=steps, cache_interval=interval)
        drawing = partial(engine.sample, batch_size, label=label, seed=1, **settings)
        with tqdm(total=rounds, unit=" rounds", file=sys.stderr) as bar:
            timed = interleave(
                {f"interval-{one}": partial(drawing, cache_interval=one) for one in asked},
                rounds=rounds,
                warm_up=1,
                on_round=bar.update,
            )
        judged = {} if data is None else _judged(engine, data, asked, n, settings)
    cases = []
    for interval in asked:
        name = f"interval-{interval}"
        case = timed_case(
            f"step-cache/{sampler}-{steps}/{name}", timed, name, batch_size=batch_size
        )
        whole = timed.samples_ms["interval-1"]
        case["faster"] = ratio(whole, timed.samples_ms[name])
        case["images_per_s"] = 1e3 * batch_size / case["summary"]["p50"]
        case["interval"] = interval
        if interval in judged:
            case["quality"] = judged[interval].to_dict()
        cases.append(case)
    print_rows(table(cases))
    report = make_report(
        context, question=_QUESTION, known_unfairness=_UNFAIR, threads=threads, load_before=load
    )
    report["engine"] = {"name": engine.manifest.name, "sampler": sampler, "steps": steps}
    report["cases"] = cases
    finish(report, json_path)


def _judged(
    engine: Engine, data: Path, intervals: list[int], n: int, settings: dict[str, Any]
) -> dict[int, Quality]:
    """How good the images of each interval are."""
    held_out = read_real_images(data, split="t10k", size=IMAGE_SHAPE[0], channels=IMAGE_SHAPE[2])
    reference = Reference(Judge.load(), held_out)
    found = {}
    for interval in intervals:
        drawing = draw(engine, n, spacing=None, seed=0, cache_interval=interval, **settings)
        found[interval] = reference.measure(drawing.images, drawing.labels)
    return found


def table(cases: list[Case]) -> list[tuple[str, ...]]:
    """Speed beside quality, a line an interval."""
    rows = [
        ("whole every", "images/s", "times as fast", "Fréchet distance", "KID × 1000", "right %")
    ]
    for case in cases:
        faster, quality = case["faster"], case.get("quality")
        judged = ("", "", "")
        if quality is not None:
            right = quality["accuracy"]
            judged = (
                f"{quality['frechet']:.4f}",
                f"{1e3 * quality['kid']['mean']:.2f} ± {1e3 * quality['kid']['deviation']:.2f}",
                "" if right is None else f"{100 * right['overall']:.1f}",
            )
        rows.append(
            (
                "evaluation" if case["interval"] == 1 else f"{case['interval']} evaluations",
                f"{case['images_per_s']:.1f}",
                f"{faster['p50']:.2f} ({faster['p5']:.2f}–{faster['p95']:.2f})",
                *judged,
            )
        )
    return rows
