"""What may be done with a run directory, decided from its files alone. Must not import torch."""

from __future__ import annotations

from pathlib import Path

from ddpm_runtime.errors import CheckpointError, ConfigurationError

from .config import TrainConfig, changed_fields, config_from_recipe

__all__ = ["RECIPE", "RESUME", "check_run_directory", "refuse_changes", "saved_config"]

RECIPE, RESUME = "recipe.json", "resume.pt"

# Fields that may differ when a run is resumed: how far and how it is shown, not what is learned.
_MAY_CHANGE = frozenset(
    {"optimization.steps", "run.device", "run.threads", "data.max_memory_gib"}
    | {f"run.{name}" for name in ("log_every", "save_every", "sample_every", "sample_count")}
)


def check_run_directory(path: Path, config: TrainConfig, *, resume: bool) -> None:
    """Refuse at once what :func:`ddpm_train.loop.train` would refuse after reading the data.

    Raises:
        ConfigurationError: a run is there and ``resume`` was not asked for, or it has another
            config.
        CheckpointError: ``resume`` was asked for and no run is there.
    """
    if resume:
        refuse_changes(path, saved_config(path), config)
    elif (path / RESUME).exists():
        raise ConfigurationError(
            f"{str(path)!r} already holds a run. Continue it with --resume, or choose "
            "another --out."
        )


def saved_config(path: Path) -> TrainConfig:
    """The config of the run in the directory ``path``.

    Raises:
        CheckpointError: there is no run.
        ConfigurationError: its recipe is damaged.
    """
    if not (path / RESUME).is_file():
        raise CheckpointError(
            f"nothing to resume in {str(path)!r}: it has no {RESUME}. Leave --resume out to start "
            "a run there."
        )
    return config_from_recipe(path / RECIPE)


def refuse_changes(path: Path, saved: TrainConfig, config: TrainConfig) -> None:
    """Refuse to resume with a config under which the result would be another.

    Raises:
        ConfigurationError: naming the first field that differs.
    """
    for name, before, now in changed_fields(saved, config):
        if name not in _MAY_CHANGE:
            raise ConfigurationError(
                f"cannot resume with {name} = {now!r}: the run in {str(path)!r} has {before!r}. "
                "Leave it as it was, or start a new run with another --out."
            )
