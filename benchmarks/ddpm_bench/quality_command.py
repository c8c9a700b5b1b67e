"""ddpm-bench quality: class accuracy, Fréchet distance and KID, beside what real images score."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from tqdm import tqdm

from ddpm_runtime import Engine
from ddpm_runtime.backends import PRECISIONS
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.runner import BACKEND_CHOICES
from ddpm_runtime.schedule import SPACINGS

from .data import class_counts, read_real_images, splits_of
from .drawing import Drawing, draw, read_images
from .judge import IMAGE_SHAPE, Judge
from .plots import check_plot, plot_quality
from .quality import FLOOR_SEED, KID_SEED, Accuracy, Floor, Quality, Reference
from .report import check_json, command_line, environment, print_machine, print_rows, write_json

__all__ = ["quality_command"]

_QUESTION = (
    "Are the images what was asked, and are they distributed like held-out real images, "
    "as an independent classifier sees them?"
)
_UNFAIR = [
    "the judge knows Fashion-MNIST only, and is wrong on some real images itself",
    "both distances depend on the judge; compare them only between reports that name its sha256",
    "the Fréchet distance is biased by n; compare it only at one n",
    "sets with exactly balanced classes score a slightly lower KID; the 'train' floor has them too",
    "neither distance sees memorised training images; the 'train' floor is made of them",
]


@click.command("quality")
@click.option("--engine", "engine_path", type=click.Path(path_type=Path), help="Draw from this.")
@click.option("--images", "images_path", type=click.Path(path_type=Path), help="Or judge an .npz.")
@click.option(
    "--data",
    required=True,
    type=click.Path(path_type=Path),
    help="Real images: folder of Fashion-MNIST's IDX files.",
)
@click.option("-n", "--num-images", "n", default=5000, help="Images to draw for each case.")
@click.option("--sampler", "samplers", multiple=True, help="Repeat for more.  [the engine's]")
@click.option("--steps", "steps", type=int, multiple=True, help="Repeat for more.  [the engine's]")
@click.option("--spacing", type=click.Choice(sorted(SPACINGS)), help="Timesteps.  [the engine's]")
@click.option("--guidance-scale", type=float, default=None, help="1 is off.  [the engine's]")
@click.option("--seed", default=0, help="Seed of every image drawn.")
@click.option("--classes-in-turn", is_flag=True, help="--images holds ddpm-run's --class all.")
@click.option("--splits", default=5, help="Sets of real images for each floor.")
@click.option("--cache-interval", type=int, default=None, help="Step caching; 1 is off.")
@click.option("--batch-size", type=int, default=None, help="Images in flight; changes speed only.")
@click.option("--device", default="auto", help="auto, cpu, cuda, or cuda:N.")
@click.option("--backend", type=click.Choice(BACKEND_CHOICES), default="auto", help="With what.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="auto", help="auto: as exported."
)
@click.option("--threads", type=int, default=None, help="[default: usable processors]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Plot it (.png, .svg).")
@click.pass_context
def quality_command(
    context: click.Context, /, data: Path, n: int, splits: int,
    images_path: Path | None, json_path: Path | None, plot_path: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """Measure images against held-out real images.

    The distances are measured in the features of a classifier trained on the real training
    images, whose accuracy and hash are printed. Every combination of --sampler and --steps is one
    case.
    """
    _check(context, n, splits, images_path, settings)
    check_plot(plot_path)
    check_json(json_path)
    _check_data(data)
    judge = Judge.load()
    drawings = _drawings(n, images_path, judge, settings)
    first = next(drawings)  # refuse what cannot be drawn before looking at real images
    reference, floors = _reference(data, judge, first, splits)
    report = _report(context, judge, floors)
    measured: list[tuple[Drawing, Quality]] = []
    for drawing in chain((first,), drawings):
        quality = reference.measure(drawing.images, drawing.labels)
        measured.append((drawing, quality))
        report["cases"].append({"source": drawing.source} | quality.to_dict())
        if json_path is not None:  # after every case: a long sweep keeps what it has
            write_json(json_path, report)
    _print(report, measured, floors, judge, reference)
    if plot_path is not None:
        plot_quality(plot_path, report)


def _reference(
    data: Path, judge: Judge, first: Drawing, splits: int
) -> tuple[Reference, list[Floor]]:
    """The held-out images as the judge sees them, and the floors for sets like ``first``."""
    train, held_out = (
        read_real_images(data, split=split, size=IMAGE_SHAPE[0], channels=IMAGE_SHAPE[2])
        for split in ("train", "t10k")
    )
    with tqdm(unit=" images", desc="judge", file=sys.stderr) as bar:
        reference = Reference(judge, held_out, on_progress=bar.update)
        counts = class_counts(first.labels, len(first.images), len(judge.classes))
        floors = [
            reference.floor_of_training_images(train, counts, splits),
            reference.floor_of_halves(len(first.images), splits),
        ]
    return reference, floors


def _report(context: click.Context, judge: Judge, floors: list[Floor]) -> dict[str, Any]:
    """Everything but the cases, as plain JSON values."""
    return {
        "report": "ddpm-bench quality",
        "report_version": 1,
        "question": _QUESTION,
        "known_unfairness": _UNFAIR,
        "command": command_line(context),
        "judge": {name: judge.card[name] for name in ("sha256", "held_out", "held_out_accuracy")},
        "seeds": {"floors": FLOOR_SEED, "kid": KID_SEED},
        "floors": [floor.to_dict() for floor in floors],
        "environment": environment(),
        "cases": [],
    }


def _check(
    context: click.Context,
    n: int,
    splits: int,
    images_path: Path | None,
    settings: dict[str, Any],
) -> None:
    """Refuse what cannot be measured, before any work."""
    if (settings["engine_path"] is None) == (images_path is None):
        raise click.UsageError("give exactly one of --engine and --images.")
    options = (
        *("n", "samplers", "steps", "spacing", "guidance_scale", "seed"),
        *("cache_interval", "batch_size", "device", "backend", "precision"),
    )
    typed = [o for o in options if context.get_parameter_source(o) != ParameterSource.DEFAULT]
    if images_path is not None and typed:
        raise click.UsageError(
            "-n, --sampler, --steps, --spacing, --guidance-scale, --seed, --cache-interval, "
            "--batch-size, --device, --backend and --precision draw images from --engine; "
            "--images holds images already drawn, and all of them are measured."
        )
    if images_path is None and settings["classes_in_turn"]:
        raise click.UsageError("--classes-in-turn describes --images; leave it out with --engine.")
    if n < 2:
        raise click.UsageError(f"a distribution needs -n ≥ 2 images; got {n}. Use 5000.")
    if splits < 1:
        raise click.UsageError(f"--splits must be ≥ 1; got {splits}.")


def _check_data(data: Path) -> None:
    """Refuse data without held-out images: distances to the training images prove nothing.

    Raises:
        ConfigurationError: not a folder with both splits.
    """
    splits = splits_of(data)
    if set(splits) != {"t10k", "train"}:
        found = "no such splits" if splits == ("all",) else f"only {', '.join(splits)}"
        raise ConfigurationError(
            f"--data must be a folder with the train-* and t10k-* IDX files of Fashion-MNIST; "
            f"{data.name!r} has {found}. Debian packages it: apt-get download "
            "dataset-fashion-mnist, dpkg-deb -x it, and give usr/share/datasets/fashion-mnist."
        )


def _drawings(
    n: int, images_path: Path | None, judge: Judge, settings: dict[str, Any]
) -> Iterator[Drawing]:
    """Every set of images to measure, drawn when asked for."""
    if images_path is not None:
        in_turn = len(judge.classes) if settings["classes_in_turn"] else 0
        yield read_images(images_path, classes_in_turn=in_turn)
        return
    opening = {name: settings[name] for name in ("device", "backend", "precision", "threads")}
    with Engine.load(settings["engine_path"], **opening) as engine:
        _check_engine(engine, judge)
        cases = list(product(settings["samplers"] or (None,), settings["steps"] or (None,)))
        drawn = {
            name: settings[name]
            for name in ("spacing", "guidance_scale", "seed", "cache_interval", "batch_size")
        }
        for sampler, steps in cases:  # refuse the last case before drawing the first
            engine.program(
                sampler=sampler,
                steps=steps,
                spacing=settings["spacing"],
                cache_interval=settings["cache_interval"],
            )
        for sampler, steps in cases:
            yield draw(engine, n, sampler=sampler, steps=steps, **drawn)


def _check_engine(engine: Engine, judge: Judge) -> None:
    """Refuse an engine whose images this judge cannot look at.

    Raises:
        ConfigurationError: another image shape or another number of classes.
    """
    image, classes = engine.manifest.image, engine.manifest.network.num_classes
    shape = (image.height, image.width, image.channels)
    if shape != IMAGE_SHAPE or classes not in (0, len(judge.classes)):
        raise ConfigurationError(
            f"the judge looks at images {IMAGE_SHAPE} of {len(judge.classes)} classes "
            f"(Fashion-MNIST); this engine draws {shape} of {classes} classes. Use an engine "
            "trained on Fashion-MNIST."
        )


def _print(
    report: dict[str, Any],
    measured: list[tuple[Drawing, Quality]],
    floors: list[Floor],
    judge: Judge,
    reference: Reference,
) -> None:
    """The readable table, on stdout."""
    rows = [("", "n", "class accuracy %", "Fréchet distance", "KID ×1000")]
    for drawing, quality in measured:
        asked = quality.accuracy is not None
        rows.append(
            (
                _name(drawing.source),
                str(quality.n),
                _percent(quality.accuracy) if asked else "not asked",
                f"{quality.frechet:.4f}",
                _with_spread(quality.kid.mean, quality.kid.deviation, 1000),
            )
        )
    for floor in floors:
        rows.append(
            (
                f"real images ({floor.name}, {floor.splits} sets, against {floor.against})",
                str(floor.n),
                "",
                _with_spread(floor.frechet, floor.frechet_deviation, digits=4),
                _with_spread(floor.kid, floor.kid_deviation, 1000),
            )
        )
    held_out = str(reference.n)
    rows.append(("real images (held out)", held_out, _percent(reference.judge_accuracy), "", ""))
    print_rows(rows)
    _print_classes(measured, reference, judge)
    click.echo(f"\njudge sha256 {judge.sha256}")
    print_machine(report)


def _print_classes(
    measured: list[tuple[Drawing, Quality]], reference: Reference, judge: Judge
) -> None:
    """Accuracy class by class, each case beside the real held-out images."""
    present = [(_name(d.source), q.accuracy) for d, q in measured if q.accuracy is not None]
    if reference.judge_accuracy is not None:
        present.append(("held out", reference.judge_accuracy))
    if len(present) < 2:
        return
    click.echo("\nclass accuracy %, by class")
    rows: list[tuple[str, ...]] = [("", *(name for name, _ in present))]
    for label, name in enumerate(judge.classes):
        shares = (accuracy.by_class[label] for _, accuracy in present)
        rows.append((name, *("" if s is None else f"{100 * s:.1f}" for s in shares)))
    print_rows(rows)


def _name(source: dict[str, Any]) -> str:
    if "images" in source:
        return str(source["images"])
    guidance, interval = source["guidance_scale"], source["cache_interval"]
    suffix = "" if guidance == 1.0 else f" guidance {guidance:g}"
    suffix += "" if interval == 1 else f" cache interval {interval}"
    return f"{source['sampler']} {source['steps']}{suffix}"


def _percent(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return ""
    return f"{100 * accuracy.overall:.1f} ± {100 * accuracy.standard_error:.1f}"


def _with_spread(value: float, deviation: float | None, times: float = 1.0, digits: int = 3) -> str:
    spread = "" if deviation is None else f" ± {times * deviation:.{digits}f}"
    return f"{times * value:.{digits}f}{spread}"
