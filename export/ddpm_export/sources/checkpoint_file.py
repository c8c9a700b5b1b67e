"""The ``model.pt`` or ``model.safetensors`` of ddpm-train: averaged weights and a header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_runtime.bundle import Image
from ddpm_train.checkpoint import Checkpoint, load_checkpoint, network_from_checkpoint

from .base import Source, TrainedNetwork

__all__ = ["CHECKPOINT_FILE"]


def _recognises(path: Path) -> bool:
    return path.is_file()


def _load(path: Path) -> TrainedNetwork:
    """Read the checkpoint.

    Raises:
        CheckpointError: damaged, of another kind, a pickle that wants to run code, or weights that
            are NaN or infinite.
    """
    checkpoint = load_checkpoint(path)
    return TrainedNetwork(
        network=network_from_checkpoint(checkpoint).float().eval(),
        image=Image(
            height=checkpoint.image_size,
            width=checkpoint.image_size,
            channels=checkpoint.image_channels,
            value_range=checkpoint.value_range,
        ),
        schedule_spec=checkpoint.schedule_spec,
        prediction_type=checkpoint.prediction_type,
        learned_variance=checkpoint.learned_variance,
        num_classes=checkpoint.num_classes,
        class_names=checkpoint.class_names,
        provenance=_provenance(checkpoint),
    )


def _provenance(checkpoint: Checkpoint) -> dict[str, str]:
    """The training's own account as text values, each under "training"."""
    training: Mapping[str, Any] = {"step": checkpoint.step, **checkpoint.provenance}
    return {
        f"training.{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in training.items()
    }


CHECKPOINT_FILE = Source(
    what="a model.pt or model.safetensors written by ddpm-train",
    recognises=_recognises,
    load=_load,
)
