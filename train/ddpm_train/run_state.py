"""The files of a run directory, and what it takes to continue one.

    model.pt      the moving average, for export and sampling
    resume.pt     everything, to continue
    recipe.json   the config
    metrics.csv   a row every ``log_every`` steps
    curve.png     the loss so far
    samples/      a grid of images every ``sample_every`` steps
    skipped.txt   image files that could not be used, and why

Only the leading process writes.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

import ddpm_runtime
from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.errors import CheckpointError, ConfigurationError

from .checkpoint import FORMAT_VERSION, RESUME_FORMAT, read_state, save_checkpoint, write_state
from .config import TrainConfig, config_from_mapping
from .data import ImageDataset
from .learner import Learner
from .run_files import RECIPE, RESUME, refuse_changes
from .unet import UNetConfig

__all__ = ["RunDirectory", "network_config_for"]


@dataclass(frozen=True, kw_only=True)
class RunDirectory:
    """Where a run keeps its files.

    Args:
        path: the directory.
        data_sha256: fingerprint of the data set.
        class_names: names of its classes.
    """

    path: Path
    data_sha256: str = ""
    data_count: int = 0
    class_names: tuple[str, ...] = field(default=())

    @property
    def model(self) -> Path:
        """The inference checkpoint."""
        return self.path / "model.pt"

    @property
    def resume(self) -> Path:
        """The state to continue from."""
        return self.path / RESUME

    @property
    def metrics(self) -> Path:
        """The metrics file."""
        return self.path / "metrics.csv"

    @classmethod
    def for_data(cls, path: Path, dataset: ImageDataset) -> RunDirectory:
        """The run directory at ``path``, for a run on this data set."""
        return cls(
            path=path,
            data_sha256=dataset.fingerprint(),
            data_count=len(dataset),
            class_names=dataset.class_names,
        )

    def save(self, learner: Learner, window: dict[str, list[float]]) -> None:
        """Write ``model.pt``, then ``resume.pt``: each the old one or the new one, never torn.

        Args:
            learner: the state of the run.
            window: losses not yet in the metrics.

        Raises:
            CheckpointError: the weights are NaN or infinite; the files stay as they were.
        """
        state = {
            "format": RESUME_FORMAT,
            "format_version": FORMAT_VERSION,
            "config": learner.config.to_dict(),
            "data_sha256": self.data_sha256,
            "window": window,
            **learner.state(),
        }
        save_checkpoint(
            self.model,
            learner.network.config,
            learner.average.weights,
            schedule_spec=learner.schedule.spec,
            prediction_type=learner.config.diffusion.prediction_type,
            class_names=self.class_names,
            step=learner.step,
            provenance=self._provenance(learner.config),
        )
        write_state(self.resume, state)

    def load(self, config: TrainConfig) -> dict[str, Any]:
        """Read ``resume.pt``, checked against the config and the data of this run.

        Raises:
            CheckpointError: nothing to continue, or a damaged file.
            ConfigurationError: the config or the data is another one.
        """
        values = read_state(self.resume, RESUME_FORMAT)
        try:
            saved = config_from_mapping(values["config"])
            data_sha256 = values["data_sha256"]
        except KeyError as error:
            raise CheckpointError(f"{str(self.resume)!r} lacks {error}.") from error
        refuse_changes(self.path, saved, config)
        if data_sha256 != self.data_sha256:
            raise ConfigurationError(
                f"cannot resume on other data: the images or labels are not those that the run in "
                f"{str(self.path)!r} began with. Give the same --data, or start a new run with "
                "another --out."
            )
        return values

    def write_recipe(self, config: TrainConfig) -> None:
        """Write the config as ``recipe.json``, which ``--config`` reads."""
        with atomic_file(self.path / RECIPE) as file:
            file.write(msgspec.json.format(msgspec.json.encode(config.to_dict())) + b"\n")

    def write_skipped(self, skipped: tuple[tuple[str, str], ...]) -> None:
        """List the image files that were not used, one a line with the reason, if there are any."""
        if skipped:
            with atomic_file(self.path / "skipped.txt") as file:
                for name, reason in skipped:
                    file.write(f"{name!r}: {reason}\n".encode())

    def _provenance(self, config: TrainConfig) -> dict[str, Any]:
        return {
            "made_by": f"ddpm-engine {ddpm_runtime.__version__}",
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "recipe": config.to_dict(),
            "data": {"images": self.data_count, "sha256": self.data_sha256},
        }


def network_config_for(config: TrainConfig, dataset: ImageDataset) -> UNetConfig:
    """The network of a recipe on a data set: the data decides channels and classes."""
    _, channels, size, _ = dataset.images.shape
    values = msgspec.to_builtins(config.network)
    return UNetConfig(
        image_size=size, image_channels=channels, num_classes=dataset.num_classes, **values
    )
