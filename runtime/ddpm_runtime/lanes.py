"""The reverse diffusion loop on the host: registers in NumPy, one row per ``advance``.

This file is the specification; device executors do the same arithmetic in the same order. A lane is
one image in flight with its own program, row, seed, label and guidance. ``advance`` moves every
active lane one row, so lanes that run different samplers, or started at different times, share each
network evaluation.

Arithmetic is float32, every product and sum rounded on its own. Sums run over r_0 … r_K, m, x0, z
in that order, starting from +0, so leaving out a term whose weight is zero changes no bit: a
lane's image does not depend on what its neighbours run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .backends.base import Backend, NetworkShape
from .errors import ConfigurationError, LifecycleError
from .evaluation import Evaluator
from .images import to_uint8
from .noise import noise
from .noise_ahead import NoiseAhead
from .portable_math import exp
from .program import SamplerProgram

__all__ = ["Finished", "HostLanes", "Known", "check_fits"]

Float = NDArray[np.float32]

_KNOWN_DRAWS = 1 << 31


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """The part of an image that is given, for inpainting.

    After every row, on the level (signal, noise) where the row ended,

        r_0 = mask · (signal · image + noise · z) + (1 − mask) · r_0

    with z the row's draw number plus 2³¹, so that it never meets the sampler's own noise.

    Source: Lugmayr et al. (RePaint), arXiv 2201.09865 Algorithm 1, lines 4 and 8.

    Args:
        image: (C, H, W) float32 in [−1, 1].
        mask: (C, H, W) float32 in [0, 1]; 1 where the image is given.
    """

    image: Float
    mask: Float


@dataclass(kw_only=True, eq=False)
class _Lane:
    """One image in flight."""

    tag: Any
    program: SamplerProgram
    row: int
    seed: int
    index: int
    label: int
    guidance_scale: float
    known: Known | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A lane that reached the end of its program, or failed on the way.

    Args:
        tag: what ``start`` was given.
        image: (C, H, W) float32, nominally in [−1, 1].
        failed_row: the row after which x_t held NaN or infinity; None when all went well.
    """

    tag: Any
    image: Float
    failed_row: int | None

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, C) uint8."""
        return to_uint8(self.image)


def check_fits(shape: NetworkShape, program: SamplerProgram, guidance_scale: float) -> None:
    """Refuse to start what a network cannot do.

    Raises:
        ConfigurationError: a learned variance, or guidance, of a network that has none.
    """
    channels = shape.image[0]
    if program.learns_variance and shape.prediction_channels != 2 * channels:
        raise ConfigurationError(
            f"the {program.sampler} program needs a network that predicts {2 * channels} channels, "
            f"half of them the variance; this one predicts {shape.prediction_channels}. Choose a "
            "fixed variance."
        )
    if guidance_scale != 1.0 and not shape.num_classes:
        raise ConfigurationError(
            f"guidance_scale={guidance_scale} was asked of an unconditional network; leave it at 1 "
            "(off)."
        )


class HostLanes:
    """Up to ``capacity`` images in flight over one network.

    Active lanes are kept at the front of every buffer, so the network never evaluates an empty one.

    Args:
        backend: the loaded network.
        capacity: lanes, ≥ 1. A class-conditional network gets twice as many rows, for guidance.

    Raises:
        ConfigurationError: capacity < 1.
    """

    def __init__(self, backend: Backend, capacity: int) -> None:
        if capacity < 1:
            raise ConfigurationError(f"batch size must be ≥ 1; got {capacity}.")
        self.shape = backend.shape
        self.capacity = capacity
        self._evaluator = Evaluator(backend, capacity)
        self.rows_done = 0  # over all lanes, since these were made
        self._lanes: list[_Lane] = []
        self._registers: list[Float] = [self._buffer()]
        self._next: list[Float] = [self._buffer()]
        self._x_0, self._term = self._buffer(), self._buffer()
        self._noise = NoiseAhead(capacity, self._term[0].size)

    @property
    def active(self) -> int:
        """Lanes in flight."""
        return len(self._lanes)

    @property
    def free(self) -> int:
        """Lanes that may be started."""
        return self.capacity - len(self._lanes)

    def start(
        self,
        program: SamplerProgram,
        *,
        seed: int,
        index: int,
        label: int | None = None,
        guidance_scale: float = 1.0,
        initial: Float | None = None,
        known: Known | None = None,
        tag: Any = None,
    ) -> None:
        """Begin an image: x_T is draw 0 of (seed, index), unless ``initial`` is given.

        Args:
            program: the compiled sampler.
            seed: in [0, 2⁶⁴).
            index: the image's number under this seed, in [0, 2⁶⁴).
            label: class in [0, num_classes]; None, or num_classes, is no class.
            guidance_scale: 1 is off.
            initial: (C, H, W) float32, r_0 before the first row.
            known: the part of the image that is given.
            tag: returned with the finished image.

        Raises:
            LifecycleError: no lane is free.
            ConfigurationError: a program or guidance that does not fit the network.
        """
        if not self.free:
            raise LifecycleError(f"all {self.capacity} lanes are in flight; call advance() first.")
        check_fits(self.shape, program, guidance_scale)
        self._evaluator.prepare(program)
        while len(self._registers) < program.registers:
            self._registers.append(self._buffer())
            self._next.append(self._buffer())
        lane = len(self._lanes)
        for register in self._registers:
            register[lane] = 0.0
        self._lanes.append(
            _Lane(
                tag=tag,
                program=program,
                row=0,
                seed=seed,
                index=index,
                label=self.shape.num_classes if label is None else label,
                guidance_scale=guidance_scale,
                known=known,
            )
        )
        x_T = self._registers[0][lane : lane + 1]
        if initial is not None:
            x_T[0] = initial
        else:
            x_T[0] = noise(seed, index, 0, x_T.size).reshape(x_T[0].shape)
            x_T *= np.float32(program.initial_scale)
        self._restore_known(x_T, self._lanes[lane:])

    def advance(self, rows: int = 1, *, pixels: bool = False) -> list[Finished]:
        """Move every active lane up to ``rows`` rows; return the lanes that finished or failed.

        Args:
            rows: how many, ≥ 1.
            pixels: whether ``pixels`` of what finished will be read, or ``image``; here both can.

        Raises:
            BackendError: the network failed; every lane keeps the state after its last row.
        """
        if rows < 1:
            raise ConfigurationError(f"rows must be ≥ 1; got {rows}.")
        finished: list[Finished] = []
        for _ in range(rows):
            finished += self._advance_row() if self.active else []
        return finished

    def images(self) -> dict[Any, Float]:
        """x_t of every lane in flight, by tag: copies of shape (C, H, W), for previews."""
        return {lane.tag: self._registers[0][i].copy() for i, lane in enumerate(self._lanes)}

    def cancel(self, unwanted: Callable[[Any], bool] = lambda tag: True) -> int:
        """Free every lane whose tag is unwanted; return how many."""
        lanes = [i for i, lane in enumerate(self._lanes) if unwanted(lane.tag)]
        for i in reversed(lanes):
            self._release(i)
        return len(lanes)

    def close(self) -> None:
        """Free every lane. Idempotent; on the host there is nothing else to release."""
        self.cancel()

    # --- the row -------------------------------------------------------------------------------

    @np.errstate(
        over="ignore", invalid="ignore"
    )  # a lane that overflows is reported, not warned of
    def _advance_row(self) -> list[Finished]:
        n = self.active
        column = self._columns()
        x_t, x_0 = self._registers[0][:n], self._x_0[:n]

        m, v = self._evaluator.predict(self._lanes, x_t, column)

        np.multiply(column("x0_from_x"), x_t, out=x_0)
        x_0 += np.multiply(column("x0_from_m"), m, out=self._term[:n])
        bound = column("clip")
        np.minimum(np.maximum(x_0, -bound, out=x_0), bound, out=x_0)

        weights = column("weights")
        draws_noise = bool(weights[:, :, -1].any())
        z = self._present_noise() if draws_noise else x_0  # of weight zero, left out
        z_0 = z if v is None or not draws_noise else self._learned_noise(z, v, column)

        registers = weights.shape[1]
        history = [register[:n] for register in self._registers[:registers]]
        for i in range(registers):
            terms = [*history, m, x_0, z if i else z_0]
            self._weighted_sum(weights[:, i], terms, out=self._next[i][:n])
        self._registers, self._next = self._next, self._registers

        for lane in self._lanes:
            lane.row += 1
        self.rows_done += n
        self._restore_known(self._registers[0], self._lanes)
        return self._retire()

    # --- the pieces of a row -------------------------------------------------------------------

    def _columns(self) -> Callable[[str], Any]:
        """Look up a program column for all lanes: shape (lanes or 1, …) ready to broadcast."""
        first = self._lanes[0]
        together = all(
            lane.program is first.program and lane.row == first.row for lane in self._lanes
        )
        lanes = self._lanes[:1] if together else self._lanes
        registers = max(lane.program.registers for lane in lanes)

        def column(name: str) -> Any:
            if name == "weights":
                return _stack_weights(lanes, registers)
            values = np.array([getattr(lane.program.table, name)[lane.row] for lane in lanes])
            return values[:, None, None, None]

        return column

    def _weighted_sum(self, weights: Float, terms: list[Float], out: Float) -> None:
        """out = Σ weights[:, j] · terms[j], in order, from +0, each step rounded."""
        term = self._term[: len(out)]
        np.multiply(weights[:, 0, None, None, None], terms[0], out=out)
        out += np.float32(0)  # −0 becomes +0, as a sum that starts from +0 has it
        for j in range(1, len(terms)):
            weight = weights[:, j]
            if weight.any():
                np.multiply(weight[:, None, None, None], terms[j], out=term)
                if not weight.all():
                    term[weight == 0.0] = 0.0  # left out, even where it is infinite
                out += term

    def _learned_noise(self, z: Float, v: Float, column: Callable[[str], Any]) -> Float:
        """z times the deviation the network chose, element by element."""
        low, high = column("log_sigma_min"), column("log_sigma_max")
        half, span = np.float32(0.5), high - low
        share = np.where(span == 0.0, np.float32(0), (v * half + half) * span)  # nothing to choose
        return exp(low + share) * z

    def _restore_known(self, x_t: Float, lanes: list[_Lane]) -> None:
        """Put the given part of each image back, on the level its lane is at; see Known."""
        for x, lane in zip(x_t, lanes, strict=False):
            if lane.known is not None:
                image, mask, table = lane.known.image, lane.known.mask, lane.program.table
                z = noise(lane.seed, lane.index, lane.row + _KNOWN_DRAWS, x.size).reshape(x.shape)
                at_level = table.signal[lane.row] * image + table.noise[lane.row] * z
                x[...] = mask * at_level + (np.float32(1) - mask) * x

    def _present_noise(self) -> Float:
        """Noise of every lane's present row, (lanes, C, H, W)."""
        return self._noise.present(self._lanes).reshape(-1, *self.shape.image)

    def _retire(self) -> list[Finished]:
        """Hand out lanes that are done, and those that hold NaN or infinity."""
        x_t = self._registers[0][: self.active]
        # a sum is finite only if every summand is; the range of float32 is far from any image
        finite = np.isfinite(x_t.reshape(len(x_t), -1).sum(axis=1, dtype=np.float64))
        finished = []
        for i in reversed(range(self.active)):
            lane = self._lanes[i]
            if lane.row == len(lane.program) or not finite[i]:
                failed_row = None if finite[i] else lane.row - 1
                finished.append(Finished(tag=lane.tag, image=x_t[i].copy(), failed_row=failed_row))
                self._release(i)
        return finished[::-1]

    def _release(self, i: int) -> None:
        """Free lane i; the last active lane takes its place."""
        last = len(self._lanes) - 1
        if i != last:
            for register in self._registers:
                register[i] = register[last]
            self._evaluator.move(last, i)
            self._lanes[i] = self._lanes[last]
        self._lanes.pop()

    def _buffer(self) -> Float:
        return np.zeros((self.capacity, *self.shape.image), np.float32)


def _stack_weights(lanes: list[_Lane], registers: int) -> Float:
    """(lanes, registers, registers + 3): smaller programs are padded with registers at zero."""
    if all(lane.program.registers == registers for lane in lanes):
        return np.stack([lane.program.table.weights[lane.row] for lane in lanes])
    out = np.zeros((len(lanes), registers, registers + 3), np.float32)
    for i, lane in enumerate(lanes):
        own = lane.program.registers
        weights = lane.program.table.weights[lane.row]
        out[i, :own, :own] = weights[:, :own]
        out[i, :own, registers:] = weights[:, own:]
    return out
