"""What every kind of checkpoint becomes before it is exported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ddpm_runtime.bundle import Image
from ddpm_runtime.errors import CheckpointError
from ddpm_runtime.trajectory import PREDICTION_TYPES

__all__ = ["Source", "TrainedNetwork"]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedNetwork:
    """A network in PyTorch, and what its training means for sampling.

    Args:
        network: called as ``network(sample, timestep[, label])`` with float32 (N, C, H, W), float32
            (N,) and, when ``num_classes > 0``, int64 (N,); returns (N, C or 2·C, H, W). In eval
            mode, float32, on the CPU.
        image: size, channels and range of its images.
        schedule_spec: ``make_schedule(**schedule_spec)`` gives the training schedule.
        prediction_type: a key of :data:`~ddpm_runtime.trajectory.PREDICTION_TYPES`.
        learned_variance: whether the second half of the prediction is a variance.
        num_classes: 0 for an unconditional network; label ``num_classes`` means "no class".
        class_names: a name for every class, or none at all.
        clip_denoised: whether predicted clean images should be clipped to the range.
        provenance: where it came from; no paths of this machine.

    Raises:
        CheckpointError: a prediction type or a range of values that engines do not have.
    """

    network: nn.Module
    image: Image
    schedule_spec: Mapping[str, Any]
    prediction_type: str
    learned_variance: bool = False
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    clip_denoised: bool = True
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise CheckpointError(
                f"the network predicts {self.prediction_type!r}; "
                f"possible: {', '.join(PREDICTION_TYPES)}."
            )
        if self.image.value_range != (-1.0, 1.0):
            raise CheckpointError(
                f"the network was trained on values in {self.image.value_range}; only (-1, 1) can "
                "be exported."
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A kind of checkpoint.

    Args:
        what: what a user would call it, for messages.
        recognises: whether a path looks like this kind; cheap, and never loads weights.
        load: reads it, running no code that it may hold.
    """

    what: str
    recognises: Callable[[Path], bool]
    load: Callable[[Path], TrainedNetwork]
