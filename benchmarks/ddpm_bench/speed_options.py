"""Options that every speed command takes, in one place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.backends import PRECISIONS
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.runner import BACKEND_CHOICES

__all__ = ["check_positive", "engine_options", "json_option", "plot_option"]

Command = Callable[..., Any]


def engine_options(command: Command) -> Command:
    """--engine, --device, --backend, --precision, --threads."""
    for option in (
        click.option("--threads", type=int, default=None, help="[default: usable processors]"),
        click.option("--precision", type=click.Choice(PRECISIONS), default="auto"),
        click.option("--backend", type=click.Choice(BACKEND_CHOICES), default="auto"),
        click.option("--device", default="auto", help="auto, cpu, cuda, or cuda:N."),
        click.option(
            "--engine",
            "engine_path",
            required=True,
            type=click.Path(path_type=Path),
            help="Engine bundle (NAME.engine).",
        ),
    ):
        command = option(command)
    return command


json_option = click.option(
    "--json", "json_path", type=click.Path(path_type=Path), help="Write the report."
)
plot_option = click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Plot it (.png, .svg, .pdf)."
)


def check_positive(**numbers: float | tuple[int, ...]) -> None:
    """Refuse numbers below one (or, for seconds, at or below zero), by the option's name.

    Raises:
        ConfigurationError: the first that is too small.
    """
    for name, given in numbers.items():
        for number in given if isinstance(given, tuple) else (given,):
            least = 0 if isinstance(number, float) else 1
            if number < least or number == 0:
                flag = "--" + name.replace("_", "-")
                raise ConfigurationError(f"{flag} must be ≥ 1; got {number}.")
