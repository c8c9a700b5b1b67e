"""What a training run is: four frozen sections, read from a recipe and overridden by flags.

    {
      "network":      {"channels": 32, "channel_multipliers": [1, 2, 3], ...},
      "data":         {"image_size": 28, "flip": false, ...},
      "diffusion":    {"schedule": {"name": "linear"}, "prediction_type": "epsilon", ...},
      "optimization": {"steps": 8000, "batch_size": 128, ...},
      "run":          {"seed": 0, "precision": "bf16", ...}
    }

A recipe is a JSON file of this shape; every section and every field may be left out. Paths are not
part of it: a recipe means the same on every machine. This file must not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from ddpm_runtime.errors import ConfigurationError, choose
from ddpm_runtime.schedule import make_schedule
from ddpm_runtime.trajectory import PREDICTION_TYPES

__all__ = [
    "LOSSES",
    "PRECISIONS",
    "DataConfig",
    "DiffusionConfig",
    "NetworkConfig",
    "OptimizationConfig",
    "RunConfig",
    "TrainConfig",
    "changed_fields",
    "config_from_mapping",
    "config_from_recipe",
    "with_overrides",
]

LOSSES = ("l2", "l1", "huber")
PRECISIONS = ("auto", "bf16", "fp32")
DECAYS = ("constant", "cosine")
SPLITS = ("train", "t10k")
DEVICES = ("auto", "cpu", "cuda")


def _option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the help text that ``ddpm-train --help`` prints, and its accepted words."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The U-Net, less what the data decides; the fields are those of ``UNetConfig``."""

    channels: int = _option(128, "feature channels of the first level")
    channel_multipliers: tuple[int, ...] = _option((1, 2, 2, 2), "channels of each level")
    residual_blocks: int = _option(2, "residual blocks a level")
    attention_resolutions: tuple[int, ...] = _option((16,), "heights with self-attention")
    attention_heads: int = _option(1, "heads of every self-attention")
    dropout: float = _option(0.1, "dropout inside residual blocks")
    norm_groups: int = _option(32, "groups of every GroupNorm")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How images are read; see :mod:`ddpm_train.data`."""

    image_size: int = _option(32, "height and width in pixels; other sizes are resized and cropped")
    image_channels: int = _option(0, "1 for grey, 3 for colour, 0 for what the data has")
    flip: bool = _option(False, "mirror half of the images left to right")
    labels: bool = _option(True, "train on class labels where the data has them")
    split: str = _option("train", "which part of an IDX folder", SPLITS)
    class_names: tuple[str, ...] = _option((), "names of the classes, where the data has none")
    follow_links: bool = _option(False, "read images and folders behind symbolic links")
    max_bad_fraction: float = _option(0.01, "unreadable image files tolerated, as a share of all")
    max_megapixels: float = _option(64.0, "larger image files are refused before decoding")
    max_memory_gib: float = _option(8.0, "bound on the decoded data set, kept in memory as uint8")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The forward process and what the network learns to say about it."""

    schedule: dict[str, Any] = field(
        default_factory=lambda: {"name": "linear", "num_train_timesteps": 1000}
    )
    prediction_type: str = _option("epsilon", "what the network predicts", tuple(PREDICTION_TYPES))
    loss: str = _option("l2", "distance between prediction and target", LOSSES)
    huber_delta: float = _option(1.0, "where the Huber loss turns from quadratic to linear")
    label_dropout: float = _option(0.1, "share of labels hidden, for classifier-free guidance")


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Adam, its learning rate over time, and the moving average of the weights."""

    steps: int = _option(100_000, "optimiser steps in all")
    batch_size: int = _option(128, "images a step, over all processes and accumulations")
    accumulation: int = _option(1, "parts in which each process takes its share of a batch")
    learning_rate: float = _option(2e-4, "learning rate of Adam after warm-up")
    warmup_steps: int = _option(500, "steps over which the learning rate rises from zero")
    decay: str = _option("constant", "learning rate after warm-up", DECAYS)
    weight_decay: float = _option(0.0, "decoupled weight decay (AdamW)")
    gradient_clip: float = _option(1.0, "largest norm of the gradient; 0 for no clipping")
    ema_decay: float = _option(0.9999, "decay of the moving average of the weights")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How the run is carried out; nothing here but ``seed`` and ``precision`` changes results."""

    seed: int = _option(0, "seed of everything random")
    precision: str = _option(
        "auto", "bf16 autocast, fp32, or what the device does best", PRECISIONS
    )
    device: str = _option("auto", "where to train", DEVICES)
    channels_last: bool = _option(False, "keep channels innermost (faster on GPUs, not on CPUs)")
    threads: int = _option(0, "CPU threads; 0 for what torch chooses")
    log_every: int = _option(50, "steps between rows of metrics.csv")
    save_every: int = _option(1000, "steps between checkpoints")
    sample_every: int = _option(5000, "steps between sample grids; 0 for none")
    sample_count: int = _option(64, "images on a sample grid")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole recipe.

    Raises:
        ConfigurationError: a field outside its range, or an unknown word.
    """

    network: NetworkConfig = field(default_factory=NetworkConfig)
    data: DataConfig = field(default_factory=DataConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            _check_choices(getattr(self, section.name))
        _check_ranges(self)
        make_schedule(**self.diffusion.schedule)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of :func:`config_from_mapping`."""
        values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(self))
        return values


def config_from_recipe(path: str | Path) -> TrainConfig:
    """Read a recipe.

    Raises:
        ConfigurationError: the file is missing, not JSON, or not a recipe.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the recipe {str(path)!r}: {error.strerror}. Recipes that come with "
            "ddpm-engine are in train/recipes/."
        ) from error
    try:
        values = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ConfigurationError(f"the recipe {str(path)!r} is not JSON: {error}.") from error
    return config_from_mapping(values)


def config_from_mapping(values: Mapping[str, Any]) -> TrainConfig:
    """Make a config of nested JSON values.

    Raises:
        ConfigurationError: an unknown section or field, a wrong type, or a value out of range.
    """
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"a recipe is a JSON object of sections; got {type(values).__name__}."
        )
    sections = {section.name: section for section in fields(TrainConfig)}
    for name, body in values.items():
        choose("section of a recipe", name, sections)
        default: Any = sections[name].default_factory  # every section has one
        if isinstance(body, Mapping):
            for key in body:
                choose(f"field of {name!r}", key, [item.name for item in fields(default)])
    try:
        return msgspec.convert(dict(values), TrainConfig)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigurationError):  # a check of ours, wrapped on its way
            raise error.__cause__ from None
        raise ConfigurationError(f"the recipe has a value of the wrong type: {error}.") from error


def with_overrides(config: TrainConfig, overrides: Mapping[tuple[str, str], Any]) -> TrainConfig:
    """The config with some fields replaced.

    Args:
        config: where to start.
        overrides: {(section, field): value}.
    """
    values = config.to_dict()
    for (section, name), value in overrides.items():
        values[section][name] = value
    return config_from_mapping(values)


Section = TypeVar("Section")


def _check_choices(section: Any) -> None:
    for item in fields(section):
        if item.metadata.get("choices"):
            choose(item.name, getattr(section, item.name), item.metadata["choices"])


# (section, field, lowest, highest); the ends are allowed.
_RANGES: tuple[tuple[str, str, float, float], ...] = (
    ("network", "channels", 1, 65536),
    ("network", "residual_blocks", 1, 1024),
    ("network", "attention_heads", 1, 1024),
    ("network", "norm_groups", 1, 65536),
    ("data", "image_size", 1, 65536),
    ("data", "max_bad_fraction", 0.0, 1.0),
    ("data", "max_megapixels", 1e-6, 89.0),
    ("data", "max_memory_gib", 1e-6, 1e6),
    ("diffusion", "huber_delta", 1e-12, 1e12),
    ("diffusion", "label_dropout", 0.0, 1.0),
    ("optimization", "steps", 1, 10**12),
    ("optimization", "batch_size", 1, 10**9),
    ("optimization", "accumulation", 1, 10**6),
    ("optimization", "learning_rate", 0.0, 1e6),
    ("optimization", "warmup_steps", 0, 10**12),
    ("optimization", "weight_decay", 0.0, 1e6),
    ("optimization", "gradient_clip", 0.0, 1e12),
    ("optimization", "ema_decay", 0.0, 1.0),
    ("run", "threads", 0, 4096),
    ("run", "log_every", 1, 10**12),
    ("run", "save_every", 1, 10**12),
    ("run", "sample_every", 0, 10**12),
    ("run", "sample_count", 1, 4096),
)


def _check_ranges(config: TrainConfig) -> None:
    for section, name, lowest, highest in _RANGES:
        value = getattr(getattr(config, section), name)
        if not lowest <= value <= highest:  # NaN fails this too
            raise ConfigurationError(
                f"{name} must be between {lowest:g} and {highest:g}; got {value!r}."
            )
    if config.data.image_channels not in (0, 1, 3):
        raise ConfigurationError(
            f"image_channels must be 1 (grey), 3 (colour) or 0 (what the data has); "
            f"got {config.data.image_channels}."
        )


def changed_fields(old: TrainConfig, new: TrainConfig) -> list[tuple[str, Any, Any]]:
    """(``section.field``, old value, new value) of every field that differs."""
    differences = []
    for section in fields(TrainConfig):
        before, after = getattr(old, section.name), getattr(new, section.name)
        for item in dataclasses.fields(before):
            pair = getattr(before, item.name), getattr(after, item.name)
            if pair[0] != pair[1]:
                differences.append((f"{section.name}.{item.name}", *pair))
    return differences
