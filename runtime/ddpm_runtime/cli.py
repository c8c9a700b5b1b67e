"""ddpm-run: thin over Engine. Pictures go to --out, the report to stdout, progress to stderr.

Exit codes: 0 done; 1 the work failed; 2 the command was wrong; 130 interrupted (what was finished
is written).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from tqdm import tqdm

from ._version import __version__
from .backends import PRECISIONS
from .bundle import Manifest, read_bundle
from .engine import Engine, Sample, StepEvent
from .errors import ConfigurationError
from .images import check_destination, grid, read_picture, save_gif, save_images
from .interpolation import slerp
from .noise import noise
from .runner import BACKEND_CHOICES, GRAPH_LEVELS, Opening
from .samplers import SAMPLERS
from .schedule import SPACINGS

__all__ = ["run"]

_GIF_FRAMES = 40


def _print_samplers(context: click.Context, _option: click.Parameter, asked: bool) -> None:
    """One line a sampler, what it is and where it comes from; one line each of its options."""
    if not asked:
        return
    row = "{:<19} {:>5} {:>10} {:>10} {:>6} {:>8}  {}"
    head = ("sampler", "order", "evals/step", "stochastic", "steps", "spacing", "source")
    click.echo(row.format(*head))
    for name, sampler in SAMPLERS.items():
        stochastic = "yes" if sampler.stochastic else "no"
        click.echo(
            row.format(
                name,
                sampler.order,
                sampler.evaluations_per_step,
                stochastic,
                sampler.recommended_steps,
                sampler.recommended_spacing,
                sampler.source,
            )
        )
        for option, default in sampler.options.items():
            shown, *others = (
                value if isinstance(value, str) else json.dumps(value)
                for value in (default, *sampler.choices.get(option, ()))
            )
            possible = ", ".join(other for other in others if other != shown)
            click.echo(f"    {option}={shown}" + (f"  or {possible}" if possible else ""))
    click.echo("\nOptions: --option KEY=VALUE. Names that diffusers and k-diffusion use work too.")
    context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--engine", "engine_path", required=True, help="Engine bundle (NAME.engine).")
@click.option("-n", "--num-images", "n", default=16, help="Images to draw.")
@click.option("-o", "--out", default="samples.png", help=".png grid, .npz array, or a folder.")
@click.option("--sampler", default=None, help="See --list-samplers.  [default: the engine's]")
@click.option("--steps", type=int, default=None, help="Sampler steps.  [default: the engine's]")
@click.option("--eta", type=float, default=None, help="DDIM's eta, 0 to 1 (Song et al. eq. 16).")
@click.option("--spacing", type=click.Choice(sorted(SPACINGS)), default=None, help="Timesteps.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Another option of the sampler; repeat for more.",
)
@click.option(
    "--clip/--no-clip",
    "clip_denoised",
    default=None,
    help="Clip predicted clean images to [-1, 1].",
)
@click.option("--seed", default=0, help="Image i of a seed never changes.")
@click.option("--first-index", default=0, help="Number of the first image under the seed.")
@click.option("--class", "label", default=None, help="Class number or name, or 'all' in turn.")
@click.option("--guidance-scale", type=float, default=None, help="1 is off.")
@click.option(
    "--guidance-interval",
    type=(float, float),
    default=None,
    help="Lowest and highest timestep at which guidance acts.",
)
@click.option("--image", "picture", default=None, help="Picture to start from, or to keep part of.")
@click.option("--strength", type=float, default=None, help="Share of the chain run from --image.")
@click.option("--mask", "mask", default=None, help="Picture: white where --image is kept.")
@click.option("--encode", is_flag=True, help="Start from the x_T of --image (DDIM inversion).")
@click.option(
    "--interpolate",
    type=(int, int),
    default=None,
    help="Morph from one index of the seed to another.",
)
@click.option(
    "--cache-interval", type=int, default=None, help="Whole network once every so many steps."
)
@click.option("--batch-size", type=int, default=None, help="Images in flight; never changes them.")
@click.option("--device", default="auto", help="auto, cpu, cuda, or cuda:N.")
@click.option("--backend", type=click.Choice(BACKEND_CHOICES), default="auto", help="With what.")
@click.option("--threads", type=int, default=None, help="[default: usable processors]")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    help="auto: as exported. bf16 on the processor: faster, other images.",
)
@click.option(
    "--lanes", type=int, default=None, help="Evaluate always so many images: same bits on a GPU."
)
@click.option(
    "--graph-level",
    type=click.Choice(GRAPH_LEVELS),
    default="auto",
    help="CUDA graphs: none, one a row, one for all.",
)
@click.option("--plan", default=None, help="TensorRT plan to use, not the plan cache's.")
@click.option("--trust-plan", is_flag=True, help="Even if somebody else built it: native code.")
@click.option("--gif", type=click.Path(), default=None, help="Also write the denoising as a GIF.")
@click.option("--info", is_flag=True, help="Print the engine's manifest and exit.")
@click.option(
    "--list-samplers",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_samplers,
    help="Print every sampler and exit.",
)
@click.version_option(__version__, prog_name="ddpm-run")
@click.pass_context
def run(
    context: click.Context, /, engine_path: str, n: int, out: str, gif: str | None, info: bool,
    options: tuple[str, ...], picture: str | None, encode: bool,
    interpolate: tuple[int, int] | None, **settings: Any,
) -> None:  # fmt: skip
    """Sample images from an engine bundle."""
    if info:
        click.echo(_describe(read_bundle(engine_path).manifest))
        return
    for destination in filter(None, (out, gif)):
        check_destination(destination)
    settings["sampler_options"] = _parse_options(options)
    opening = {field.name: settings.pop(field.name) for field in fields(Opening)}
    loading = time.perf_counter()
    with Engine.load(engine_path, **opening) as engine:
        click.echo(f"{engine.manifest.name}: {engine.description}", err=True)
        settings |= _beginning(engine, n, picture, encode, interpolate, settings)
        film = _Film(range(settings["first_index"], settings["first_index"] + min(n, 64)))
        drawing = time.perf_counter()
        samples, interrupted = _draw(engine, n, settings, film if gif else None)
        done = time.perf_counter()
    _write(samples, out, film, None if interrupted else gif)
    click.echo(
        f"{len(samples)} images in {done - drawing:.2f} s "
        f"({len(samples) / (done - drawing):.1f} images/s), loaded in {drawing - loading:.2f} s"
    )
    if interrupted:
        click.echo(f"interrupted: {len(samples)} of {n} images were finished and kept.", err=True)
        context.exit(130)


def _beginning(
    engine: Engine,
    n: int,
    picture: str | None,
    encode: bool,
    interpolate: tuple[int, int] | None,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The settings that say what the images begin from."""
    height, width, channels = engine.image_shape
    begins: dict[str, Any] = {}
    if settings["mask"] is not None:
        kept = read_picture(settings["mask"], (height, width, 1))
        begins["mask"] = kept[..., 0].astype(np.float32) / np.float32(255)
    if picture is not None:
        begins["image"] = read_picture(picture, (height, width, channels))
    if encode:
        if picture is None:
            raise ConfigurationError("--encode needs a picture to encode; give --image.")
        label, steps = settings["label"], settings["steps"] or 100
        x_T = engine.encode(begins.pop("image")[None], steps=steps, label=label)
        begins |= {"x_T": np.repeat(x_T, n, axis=0), "steps": steps}
    if interpolate is not None:
        if encode:
            raise ConfigurationError("give --encode or --interpolate, not both.")
        ends = [
            noise(settings["seed"], index, 0, height * width * channels).reshape(
                channels, height, width
            )
            for index in interpolate
        ]
        begins["x_T"] = slerp(ends[0], ends[1], n)
    return begins


def _draw(
    engine: Engine, n: int, settings: dict[str, Any], film: _Film | None
) -> tuple[list[Sample], bool]:
    """Draw with a progress bar; on an interrupt keep what is finished."""
    samples: list[Sample] = []
    interrupted = False
    layout = "{l_bar}{bar}| {n:.1f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=n, unit=" images", bar_format=layout, file=sys.stderr) as bar:

        def on_step(event: StepEvent) -> None:
            # parts of an image keep rate and ETA honest while a batch is in flight
            bar.update(n * event.rows_done / event.rows_total - bar.n)
            if film is not None:
                film.see(event)

        try:
            with _interruptible():
                for sample in engine.stream(n, on_step=on_step, **settings):
                    samples.append(sample)
        except KeyboardInterrupt:
            interrupted = True
    return sorted(samples, key=lambda sample: sample.index), interrupted


class _Film:
    """Frames of some images, by index, while they are denoised: ``_GIF_FRAMES`` of them."""

    def __init__(self, watched: range) -> None:
        self.watched = watched
        self.frames: list[Any] = []
        self._latest: dict[int, Any] = {}
        self._next_share = 0.0

    def see(self, event: StepEvent) -> None:
        share = event.rows_done / event.rows_total
        if share < self._next_share and share < 1.0:
            return
        self._next_share = share + 1.0 / _GIF_FRAMES
        previews = event.previews()
        self._latest.update({i: previews[i] for i in self.watched if i in previews})
        if len(self._latest) == len(self.watched):
            self.frames.append(grid(np.stack([self._latest[i] for i in self.watched])))


def _write(samples: list[Sample], out: str, film: _Film, gif: str | None) -> None:
    """Write what was finished, and name every file written on stdout."""
    if samples:
        images = np.stack([sample.image for sample in samples])
        indices = [sample.index for sample in samples]
        written = save_images(out, images, indices=indices)
        click.echo(str(written[0] if len(written) == 1 else Path(out)))
    if gif is not None:
        save_gif(gif, film.frames)
        click.echo(gif)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt too; a second signal is the default, immediate one."""

    def stop(_number: int, _frame: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value that reads as JSON is taken as such, else as text."""
    parsed: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ConfigurationError(f"--option takes KEY=VALUE; got {option!r}.")
        try:
            parsed[key] = msgspec.json.decode(value)
        except msgspec.MsgspecError:
            parsed[key] = value
    return parsed


def _describe(manifest: Manifest) -> str:
    """The manifest for people: strict JSON, indented."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode()
