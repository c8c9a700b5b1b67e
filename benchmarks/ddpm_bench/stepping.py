"""One step of a batch, as the engine does it: what every speed command times.

A *step* is one ``HostLanes.advance`` with all lanes active: one network evaluation and everything
around it. ``SplitBackend`` tells the two apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ddpm_runtime.backends import open_backend
from ddpm_runtime.backends.base import Backend, CachedBinding, NetworkBinding, NetworkShape
from ddpm_runtime.bundle import Bundle, read_bundle
from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.lanes import HostLanes
from ddpm_runtime.program import SamplerProgram
from ddpm_runtime.samplers import build_program

__all__ = ["SplitBackend", "Stepper", "open_split", "program_for", "step_label"]

_STEPS = 50


class SplitBackend:
    """A backend that counts the seconds its network takes."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.network_s = 0.0
        self.name: str = backend.name
        self.description: str = backend.description
        self.shape: NetworkShape = backend.shape

    def allocate(self, capacity: int) -> NetworkBinding:
        """Buffers of the backend, with a clock around ``run``."""
        binding = self._backend.allocate(capacity)

        def run(rows: int) -> None:
            began = time.perf_counter()
            binding.run(rows)
            self.network_s += time.perf_counter() - began

        return replace(binding, run=run)

    def allocate_cached(self, capacity: int) -> CachedBinding:
        """Buffers of the backend, without a clock."""
        return self._backend.allocate_cached(capacity)

    def close(self) -> None:
        """Release the network."""
        self._backend.close()


class Stepper:
    """Steps of a full batch, for ever: lanes that finish begin again, outside the clock.

    Args:
        backend: what evaluates the network.
        program: the sampler.
        batch_size: lanes.
        lanes: the class of the executor.
    """

    def __init__(
        self,
        backend: Backend,
        program: SamplerProgram,
        batch_size: int,
        lanes: Callable[[Backend, int], HostLanes] = HostLanes,
    ) -> None:
        self.lanes = lanes(backend, batch_size)
        self._program = program
        self._classes = backend.shape.num_classes
        self.begin()

    def __call__(self) -> None:
        """One step."""
        if not self.lanes.active:
            self.begin()
        self.lanes.advance()

    def begin(self) -> None:
        """Start an image in every lane that is free."""
        for index in range(self.lanes.free):
            label = index % self._classes if self._classes else None
            self.lanes.start(self._program, seed=0, index=index, label=label)


def open_split(
    engine_path: Path, *, device: str, backend: str, precision: str, threads: int | None
) -> tuple[Bundle, SplitBackend]:
    """Open a bundle's network on the processor with a clock around it.

    Raises:
        ConfigurationError: a GPU was asked for.
        BackendError: see ``backends.open_backend``.
    """
    if device not in ("auto", "cpu"):
        raise ConfigurationError(
            f"device={device!r} was asked; this command times the loop on the processor. Use "
            "ddpm-bench gpu for the one on a GPU."
        )
    bundle = read_bundle(engine_path)
    opened, reason = open_backend(bundle, backend=backend, threads=threads, precision=precision)
    split = SplitBackend(opened)
    split.description += f" ({reason})"
    return bundle, split


def program_for(bundle: Bundle, sampler: str, steps: int = _STEPS) -> SamplerProgram:
    """The sampler with its default options, for this bundle's network.

    Raises:
        ConfigurationError: no such sampler, or one that does not fit the network.
    """
    total = bundle.schedule.num_train_timesteps
    try:
        return build_program(
            sampler,
            schedule=bundle.schedule,
            prediction_type=bundle.manifest.network.prediction_type,
            num_inference_steps=min(steps, total),
        )
    except TypeError as error:
        raise ConfigurationError(f"sampler {sampler!r} cannot be timed: {error}") from error


def step_label(backend: Backend, precision: str, bundle: Bundle) -> str:
    """Backend and precision, as they stand in a case's id."""
    own = bundle.manifest.network.precision
    return f"{backend.name}-{own if precision == 'auto' else precision}"
