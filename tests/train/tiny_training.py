"""A training run that takes milliseconds a step, for the tests of this room."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ddpm_train.config import TrainConfig, config_from_mapping
from ddpm_train.data import ImageDataset
from ddpm_train.unet import UNetConfig

TINY_NETWORK = UNetConfig(
    image_size=8,
    image_channels=1,
    channels=8,
    channel_multipliers=(1, 2),
    residual_blocks=1,
    attention_resolutions=(4,),
    dropout=0.1,
    num_classes=3,
    norm_groups=4,
)


def tiny_config(**overrides: Any) -> TrainConfig:
    """A recipe for 8×8 images; ``section__field=value`` overrides."""
    values: dict[str, dict[str, Any]] = {
        "network": {
            "channels": 8,
            "channel_multipliers": [1, 2],
            "residual_blocks": 1,
            "attention_resolutions": [4],
            "dropout": 0.1,
            "norm_groups": 4,
        },
        "data": {"image_size": 8, "flip": True},
        "diffusion": {"schedule": {"name": "linear", "num_train_timesteps": 50}},
        "optimization": {
            "steps": 12,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_steps": 2,
            "ema_decay": 0.99,
        },
        "run": {
            "precision": "fp32",
            "device": "cpu",
            "log_every": 3,
            "save_every": 4,
            "sample_every": 0,
        },
    }
    for name, value in overrides.items():
        section, field = name.split("__")
        values[section][field] = value
    return config_from_mapping(values)


def tiny_dataset(count: int = 20, *, classes: int = 3, seed: int = 0) -> ImageDataset:
    """Noise images with random labels; 20 images and batches of 8: epochs end inside batches."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count) if classes else None
    return ImageDataset(
        images=rng.integers(256, size=(count, 1, 8, 8), dtype=np.uint8),
        labels=labels,
        class_names=tuple(f"class {number}" for number in range(classes)),
    )


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts are equal bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.int32), second[name].view(torch.int32)) for name in first
    )
