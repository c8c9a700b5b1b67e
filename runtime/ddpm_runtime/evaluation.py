"""The network's answers for every lane in flight: whole, guided, or from kept deep features.

A lane's row says whether the network is asked at all and whether with guidance, which takes a
second network row without a label. With step caching it also says whether the whole network is
evaluated, its deep features being kept with the lane, or only its outer layers, on the deep
features kept. Lanes of a kind are evaluated together; what a lane gets depends on its row alone.

Source of step caching: Ma et al. (DeepCache), arXiv 2312.00858 §3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, CachedBinding, NetworkBinding
from .guidance import guide
from .program import SamplerProgram

__all__ = ["Evaluator"]

Float = NDArray[np.float32]
Column = Callable[[str], Any]


class AskingLane(Protocol):
    """What must be known of a lane."""

    program: SamplerProgram
    row: int
    label: int
    guidance_scale: float


class Evaluator:
    """Evaluates the network for up to ``capacity`` lanes, the active ones at the front.

    Args:
        backend: the loaded network.
        capacity: lanes, ≥ 1. A class-conditional network gets twice as many rows, for guidance.
    """

    def __init__(self, backend: Backend, capacity: int) -> None:
        self.shape = backend.shape
        self._backend = backend
        self._capacity = capacity
        self._rows = self.shape.rows_for(capacity)
        self._binding: NetworkBinding = backend.allocate(self._rows)
        self._cached: CachedBinding | None = None
        self._deep = self._answers = np.zeros(0, np.float32)

    def prepare(self, program: SamplerProgram) -> None:
        """Get ready for a program, once, before its first row.

        Raises:
            ConfigurationError: it caches steps and the backend cannot.
        """
        if program.caches and self._cached is None:
            self._cached = binding = self._backend.allocate_cached(self._rows)
            # a lane's features, then those of its guidance
            self._deep = np.zeros((2 * self._capacity, *binding.deep.shape[1:]), np.float32)
            self._answers = np.zeros_like(binding.prediction[: self._capacity])

    def predict(
        self, lanes: Sequence[AskingLane], x_t: Float, column: Column
    ) -> tuple[Float, Float | None]:
        """What the network answers: prediction, and learned variance if it has one.

        Args:
            lanes: the active ones.
            x_t: (lanes, C, H, W) float32.
            column: the present row of a program column, (lanes or 1, 1, 1, 1).
        """
        if self._cached is not None and any(lane.program.caches for lane in lanes):
            answers = self._in_groups(lanes, x_t, column)
        else:
            answers = self._binding.prediction[: len(lanes)]
            if column("evaluates").any():
                guided = self._fill(
                    self._binding, lanes, x_t, column("input_scale"), column("timesteps")
                )
                self._binding.run(len(lanes) + len(guided))
                _guide(self._binding, lanes, guided, self.shape.image[0])
        channels = self.shape.image[0]
        learned = answers[:, channels:] if self.shape.prediction_channels > channels else None
        return answers[:, :channels], learned

    def move(self, source: int, destination: int) -> None:
        """A lane took another's place: what is kept for it moves along."""
        if self._cached is not None:
            for start in (0, self._capacity):
                self._deep[start + destination] = self._deep[start + source]

    def _in_groups(self, lanes: Sequence[AskingLane], x_t: Float, column: Column) -> Float:
        """Lanes of different kinds, a kind at a time; answers in the order of the lanes."""
        answers = self._answers[: len(lanes)]
        each = (len(lanes), 1, 1, 1)
        scales = np.broadcast_to(column("input_scale"), each)
        timesteps = np.broadcast_to(column("timesteps"), each)
        kinds = [_kind(lane) for lane in lanes]
        for kind in ("plain", "whole", "shallow"):
            members = [i for i, found in enumerate(kinds) if found == kind]
            if not members:
                continue
            asking = [lanes[i] for i in members]
            cached = self._cached if kind != "plain" else None
            binding = cached or self._binding
            guided = self._fill(binding, asking, x_t[members], scales[members], timesteps[members])
            rows = len(members) + len(guided)
            if cached is None:
                self._binding.run(rows)
            else:
                slots = members + [self._capacity + members[i] for i in guided]
                if kind == "shallow":
                    cached.deep[:rows] = self._deep[slots]
                    cached.run_shallow(rows)
                else:
                    cached.run_whole(rows)
                    self._deep[slots] = cached.deep[:rows]
            _guide(binding, asking, guided, self.shape.image[0])
            answers[members] = binding.prediction[: len(members)]
        return answers

    def _fill(
        self,
        binding: NetworkBinding | CachedBinding,
        lanes: Sequence[AskingLane],
        x_t: Float,
        input_scale: Float,
        timesteps: Float,
    ) -> list[int]:
        """Write a network row for each lane, then one for each that is guided; say which are."""
        n = len(lanes)
        np.multiply(input_scale, x_t, out=binding.sample[:n])
        binding.timestep[:n] = timesteps[:, 0, 0, 0]
        binding.label[:n] = [lane.label for lane in lanes]
        guided = [i for i, lane in enumerate(lanes) if _is_guided(lane)]
        if guided:
            rows, asked = slice(n, n + len(guided)), _places(guided, n)
            binding.sample[rows] = binding.sample[asked]
            binding.timestep[rows] = binding.timestep[asked]
            binding.label[rows] = self.shape.num_classes
        return guided


def _kind(lane: AskingLane) -> str:
    table = lane.program.table
    if not table.evaluates[lane.row]:
        return "none"
    if not lane.program.caches:
        return "plain"
    return "shallow" if table.shallow[lane.row] else "whole"


def _is_guided(lane: AskingLane) -> bool:
    return lane.guidance_scale != 1.0 and bool(lane.program.table.guided[lane.row])


def _guide(
    binding: NetworkBinding | CachedBinding,
    lanes: Sequence[AskingLane],
    guided: list[int],
    channels: int,
) -> None:
    """Combine the two rows of each guided lane in the first."""
    if guided:
        n, prediction = len(lanes), binding.prediction
        scales = np.array([lanes[i].guidance_scale for i in guided], np.float32)
        asked = _places(guided, n)
        conditional = prediction[asked, :channels]
        guide(conditional, prediction[n : n + len(guided), :channels], scales)
        prediction[asked, :channels] = conditional


def _places(guided: list[int], n: int) -> slice | list[int]:
    """Where the guided lanes stand; where all are, a slice, which copies nothing."""
    return slice(n) if len(guided) == n else guided
