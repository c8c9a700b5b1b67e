"""ddpm-bench likelihood: bits per dimension of real images, on held-out and training data."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from ddpm_runtime.backends import Backend, open_backend
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program
from ddpm_runtime.samplers.ddpm import VARIANCES

from .data import RealImages, read_real_images, splits_of
from .likelihood import Bound, variational_bound
from .plots import check_plot, plot_likelihood
from .report import check_json, command_line, environment, print_machine, print_rows, write_json

__all__ = ["likelihood_command"]

_QUESTION = "How many bits would the network's own density need for a pixel of a real image?"
_UNFAIR = [
    "an upper bound, not the likelihood: the gap is unknown",
    "of the ancestral sampler with the variance named; other samplers have other densities",
    "class-conditional networks are told the label, whose bits are not counted",
]


@click.command("likelihood")
@click.option("--engine", "engine_path", required=True, type=click.Path(path_type=Path))
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Real images.")
@click.option("--split", "splits", multiple=True, help="Of IDX folders.  [all of them]")
@click.option("-n", "--num-images", "n", default=128, help="Images of each split.")
@click.option("--steps", type=int, default=None, help="Rows of the chain.  [as in training]")
@click.option(
    "--variance",
    type=click.Choice(VARIANCES),
    default=None,
    help="Of each step.  [learned_range if the network learned one, else fixed_small]",
)
@click.option("--rows-per-image", type=int, default=None, help="Rows to evaluate.  [all]")
@click.option("--labels/--no-labels", default=True, help="Tell the network the classes.")
@click.option("--seed", default=0, help="Of the choice of images and of their noise.")
@click.option("--batch-size", default=64, help="Network rows at a time; changes speed only.")
@click.option("--threads", type=int, default=None, help="[default: usable processors]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Plot every term.")
@click.pass_context
def likelihood_command(
    context: click.Context, /, engine_path: Path, data: Path, splits: tuple[str, ...], n: int,
    steps: int | None, variance: str | None, threads: int | None, json_path: Path | None,
    plot_path: Path | None, **settings: Any,
) -> None:  # fmt: skip
    """Bound the bits per dimension of real images (Ho et al., arXiv 2006.11239 eq. 5).

    The network is evaluated --rows-per-image times for each image: all the chain's rows by
    default, 1000 for most networks.
    """
    for name, value in (("-n", n), ("--batch-size", settings["batch_size"])):
        if value < 1:
            raise click.UsageError(f"{name} must be ≥ 1; got {value}.")
    check_plot(plot_path)
    check_json(json_path)
    bundle = read_bundle(engine_path)
    variance = variance or default_variance(bundle)
    program = chain_of(bundle, variance, steps)
    backend, _ = open_backend(bundle, threads=threads)
    report: dict[str, Any] = {
        "report": "ddpm-bench likelihood",
        "report_version": 1,
        "question": _QUESTION,
        "known_unfairness": _UNFAIR,
        "command": command_line(context),
        "engine": bundle.manifest.name,
        "network_sha256": bundle.manifest.files["network.onnx"].sha256,
        "backend": backend.description,
        "rows": len(program),
        "variance": variance,
        "seed": settings["seed"],
        "environment": environment(),
        "cases": [],
    }
    image = bundle.manifest.image
    try:
        for split in splits or splits_of(data):
            real = read_real_images(data, split=split, size=image.height, channels=image.channels)
            bound, labelled = _measure(backend, program, real, n, split, settings)
            report["cases"].append(_case(split, bound, labelled))
            if json_path is not None:  # after every split: keep what is done
                write_json(json_path, report)
    finally:
        backend.close()
    _print(report)
    if plot_path is not None:
        plot_likelihood(plot_path, report)


def default_variance(bundle: Bundle) -> str:
    """What the network learned: the range of Nichol & Dhariwal eq. 15, or no variance."""
    return "learned_range" if bundle.manifest.network.learned_variance else "fixed_small"


def chain_of(bundle: Bundle, variance: str, steps: int | None = None) -> SamplerProgram:
    """The ancestral sampler whose density is bounded: every training timestep unless told.

    Raises:
        ConfigurationError: steps outside [1, T].
    """
    manifest = bundle.manifest
    return build_program(
        "ddpm",
        schedule=bundle.schedule,
        prediction_type=manifest.network.prediction_type,
        num_inference_steps=bundle.schedule.num_train_timesteps if steps is None else steps,
        spacing="leading",
        clip=1.0 if manifest.defaults.clip_denoised else math.inf,
        variance=variance,
    )


def _measure(
    backend: Backend,
    program: SamplerProgram,
    real: RealImages,
    n: int,
    split: str,
    settings: dict[str, Any],
) -> tuple[Bound, bool]:
    """The bound of n images of a split, and whether the network was told their classes."""
    if n > len(real):
        raise ConfigurationError(f"split {split!r} has {len(real)} images; got -n {n}.")
    order = np.random.default_rng(settings["seed"]).permutation(len(real))[:n]
    chosen = real.subset(order)
    labelled = bool(settings["labels"] and backend.shape.num_classes and chosen.labels is not None)
    rows = settings["rows_per_image"] or len(program)
    with tqdm(total=n * rows, unit=" rows", desc=split, file=sys.stderr) as bar:
        bound = variational_bound(
            backend,
            program,
            chosen.images,
            chosen.labels if labelled else None,
            seed=settings["seed"],
            rows_per_image=settings["rows_per_image"],
            batch_size=settings["batch_size"],
            on_progress=bar.update,
        )
    return bound, labelled


def _case(split: str, bound: Bound, labelled: bool) -> dict[str, Any]:
    """Plain JSON values of one split; NaN becomes null."""
    error = bound.standard_error
    return {
        "split": split,
        "n": len(bound.per_image),
        "labels": labelled,
        "bits_per_dimension": bound.bits_per_dimension,
        "standard_error": None if math.isnan(error) else error,
        "prior": bound.prior,
        "decoder": float(bound.terms[-1]),
        "timesteps": bound.timesteps.tolist(),
        "terms": [None if math.isnan(term) else float(term) for term in bound.terms],
    }


def _print(report: dict[str, Any]) -> None:
    """The readable table, on stdout."""
    rows = [("", "n", "bits/dim ≤", "L_T", "sum of L_t", "L_0")]
    for case in report["cases"]:
        total, prior, decoder = case["bits_per_dimension"], case["prior"], case["decoder"]
        error = case["standard_error"]
        rows.append(
            (
                f"{case['split']}{'' if case['labels'] else ' (no labels)'}",
                str(case["n"]),
                f"{total:.3f}" if error is None else f"{total:.3f} ± {error:.3f}",
                f"{prior:.5f}",
                f"{total - prior - decoder:.3f}",
                f"{decoder:.3f}",
            )
        )
    print_rows(rows)
    click.echo(
        f"\nnetwork sha256 {report['network_sha256']}, {report['rows']} rows, "
        f"variance {report['variance']}"
    )
    print_machine(report)
