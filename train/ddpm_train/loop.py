"""The training run: Algorithm 1 of Ho et al. (arXiv 2006.11239) with its bookkeeping around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ddpm_runtime.errors import ConfigurationError

from .batches import BatchSource
from .config import TrainConfig
from .curve import draw_curve
from .data import ImageDataset
from .device import choose_device, device_type
from .distributed import Processes, process_group
from .learner import Learner
from .learning_rate import learning_rate_at
from .lock import run_lock
from .metrics import MetricsFile, read_metrics
from .preview import write_grid
from .run_files import check_run_directory
from .run_state import RunDirectory, network_config_for
from .stopping import StopRequest, stop_request
from .window import Window

__all__ = ["TrainingResult", "train"]

OnStep = Callable[[int, Mapping[str, float] | None], None]


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended.

    Args:
        step: optimiser steps taken in all.
        stopped_by: the signal that ended it early, or None.
    """

    step: int
    stopped_by: int | None


def train(
    config: TrainConfig,
    dataset: ImageDataset,
    run_directory: str | Path,
    *,
    resume: bool = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train a network and keep its checkpoints in ``run_directory``.

    torch's global generators are seeded anew at every step (dropout draws from them).

    Args:
        config: the recipe.
        dataset: the images.
        run_directory: made if missing; holds ``model.pt``, ``resume.pt``, ``metrics.csv``.
        resume: continue the run that is there; on the CPU the result has the same bits as if it
            had never stopped.
        on_step: called in the leading process after every step with its number and the row of
            metrics written then, if one was.

    Raises:
        ConfigurationError: a batch that cannot be shared out, a run already there (or, to resume,
            a different one), or a directory in use.
        CheckpointError: nothing there to resume, or a damaged file.
        NonFiniteError: the loss became NaN or infinite.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    path = Path(run_directory)
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(process_group(device_type(config.run)))
        _check_shares(config, processes)
        if processes.leads:
            _make_directory(path)
            stack.enter_context(run_lock(path))
        run = Run(config, dataset, path, processes, resume=resume, on_step=on_step)
        stack.callback(run.close)
        return run.until_done(stack.enter_context(stop_request()))


class Run:
    """One process's part in a run; :func:`train` says what the arguments are."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: ImageDataset,
        path: Path,
        processes: Processes,
        *,
        resume: bool,
        on_step: OnStep | None,
    ) -> None:
        self.config, self.dataset = config, dataset
        self.processes, self.on_step = processes, on_step
        self.directory = RunDirectory.for_data(path, dataset)
        device = choose_device(config.run, processes.local_rank)
        self.learner = Learner(config, network_config_for(config, dataset), device, processes)
        self.batches = BatchSource(
            dataset,
            config,
            self.learner.schedule.num_train_timesteps,
            device=device,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        self.window = Window(config.optimization.batch_size)
        self.metrics: MetricsFile | None = None
        self._begin(resume=resume)

    def _begin(self, *, resume: bool) -> None:
        if resume:
            values = self.directory.load(self.config)
            self.learner.load_state(values)
            self.window.load_state(values["window"])
        if not self.processes.leads:
            return
        if not resume:
            check_run_directory(self.directory.path, self.config, resume=False)
        self.directory.write_recipe(self.config)
        self.directory.write_skipped(self.dataset.skipped)
        self.metrics = MetricsFile(self.directory.metrics, self.learner.step)
        if not resume:
            self._save()  # from here on there is always something to resume

    def until_done(self, stop: StopRequest) -> TrainingResult:
        """Take steps until there are enough, or a signal asks for an end."""
        settings, learner, signal_number = self.config.run, self.learner, 0
        steps = self.config.optimization.steps
        self.window.start_clock()
        while learner.step < steps and not signal_number:
            self.window.add(*learner.take_step(self.batches.batch(learner.step)))
            row = self._log() if learner.step % settings.log_every == 0 else None
            signal_number = self.processes.largest(stop.signal_number or 0)
            done = learner.step == steps
            if done or signal_number or learner.step % settings.save_every == 0:
                self._save()
            if settings.sample_every and (done or learner.step % settings.sample_every == 0):
                self._show()
            if self.on_step is not None and self.processes.leads:
                self.on_step(learner.step, row)
        return TrainingResult(step=learner.step, stopped_by=signal_number or None)

    def close(self) -> None:
        """Close the metrics."""
        if self.metrics is not None:
            self.metrics.close()

    def _log(self) -> dict[str, float]:
        row = self.window.row(self.learner.step, self.processes)
        row["learning_rate"] = learning_rate_at(self.learner.step - 1, self.config.optimization)
        self.window.clear()
        if self.metrics is not None:
            self.metrics.add(row)
        return row

    def _save(self) -> None:
        if self.processes.leads:
            self.directory.save(self.learner, self.window.state())

    def _show(self) -> None:
        """A sample grid and the training curve so far."""
        settings, diffusion = self.config.run, self.config.diffusion
        if not self.processes.leads:
            return
        images = self.learner.sample(settings.sample_count)
        write_grid(self.directory.path / "samples" / f"{self.learner.step:08d}.png", images)
        rows = read_metrics(self.directory.metrics)
        draw_curve(
            self.directory.path / "curve.png",
            [row["step"] for row in rows],
            [row["loss"] for row in rows],
            f"training loss: {diffusion.loss} on {diffusion.prediction_type}",
        )


def _check_shares(config: TrainConfig, processes: Processes) -> None:
    settings = config.optimization
    parts = processes.world_size * settings.accumulation
    if settings.batch_size % parts:
        nearest = max(parts, settings.batch_size // parts * parts)
        raise ConfigurationError(
            f"batch_size {settings.batch_size} cannot be shared equally by {processes.world_size} "
            f"processes in {settings.accumulation} parts each; use --batch-size {nearest}."
        )


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot make the run directory {str(path)!r}: {error.strerror}. Choose another --out."
        ) from error
