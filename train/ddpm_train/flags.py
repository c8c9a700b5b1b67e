"""Every field of a recipe as a command-line flag, and where a run's config comes from."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import click

from ddpm_runtime.schedule import betas_from_file

from .config import TrainConfig, config_from_recipe, with_overrides
from .run_files import saved_config

__all__ = ["recipe_flags", "resolve_config"]


class _List(click.ParamType[tuple[Any, ...]]):
    """Values joined by commas: ``1,2,2``."""

    name = "list"

    def __init__(self, kind: type) -> None:
        self._kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._kind(part) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list like 1,2,2.", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "A,B,..."


def recipe_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a click command a flag for every field of :class:`TrainConfig`.

    A flag that is left out is None, so that a recipe's value stands.
    """
    for section, item, kind in reversed(list(_recipe_fields())):
        if item.name == "schedule":
            continue
        command = _flag(section, item, kind)(command)
    schedule = click.option(
        "--schedule",
        default=None,
        metavar="NAME",
        help="Noise schedule, or a .json or .npy file of betas.  [default: linear]",
    )
    timesteps = click.option(
        "--num-train-timesteps", type=int, default=None, help="Noise levels.  [default: 1000]"
    )
    return schedule(timesteps(command))


def resolve_config(
    recipe: str | None, flags: Mapping[str, Any], resumed: Path | None = None
) -> TrainConfig:
    """The config that a command line means.

    Args:
        recipe: a recipe file, or None.
        flags: the flags of :func:`recipe_flags`; None where a flag was not given.
        resumed: the run directory to continue, whose config stands where nothing else is said.

    Raises:
        ConfigurationError: a bad recipe or value.
        CheckpointError: nothing to continue in ``resumed``.
    """
    if recipe is not None:
        base = config_from_recipe(recipe)
    elif resumed is not None:
        base = saved_config(resumed)
    else:
        base = TrainConfig()
    overrides: dict[tuple[str, str], Any] = {}
    for section, item, _kind in _recipe_fields():
        if flags.get(item.name) is not None and item.name != "schedule":
            overrides[section, item.name] = flags[item.name]
    schedule = dict(base.diffusion.schedule)
    if flags.get("schedule") is not None:  # another family: the old one's options mean nothing
        schedule = _schedule(flags["schedule"], schedule.get("num_train_timesteps", 1000))
    if flags.get("num_train_timesteps") is not None:
        schedule["num_train_timesteps"] = flags["num_train_timesteps"]
    overrides["diffusion", "schedule"] = schedule
    return with_overrides(base, overrides)


def _schedule(named: str, num_train_timesteps: int) -> dict[str, Any]:
    """The arguments of ``make_schedule`` for a family's name, or for a file of betas."""
    if Path(named).suffix not in (".json", ".npy"):
        return {"name": named, "num_train_timesteps": num_train_timesteps}
    betas = betas_from_file(named).tolist()
    return {"name": "custom", "num_train_timesteps": len(betas), "betas": betas}


def _recipe_fields() -> Iterator[tuple[str, Field[Any], Any]]:
    """(section, field, its type) of every field of a recipe."""
    for section in fields(TrainConfig):
        body: Any = section.default_factory
        kinds = typing.get_type_hints(body)
        for item in fields(body):
            yield section.name, item, kinds[item.name]


def _flag(section: str, item: Field[Any], kind: Any) -> Callable[..., Any]:
    dashed = item.name.replace("_", "-")
    default = item.default
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    help_text = f"[{section}] {item.metadata['help']}" + (f"  [default: {shown}]" if shown else "")
    if kind is bool:
        return click.option(f"--{dashed}/--no-{dashed}", default=None, help=help_text)
    if item.metadata["choices"]:
        kind = click.Choice(item.metadata["choices"])
    elif typing.get_origin(kind) is tuple:
        kind = _List(typing.get_args(kind)[0])
    return click.option(f"--{dashed}", type=kind, default=None, help=help_text)
