"""A sampler is a table; a row is one network evaluation.

For a lane with registers r_0 … r_K (r_0 is x_t, the rest are history) a row does

    m    = network(input_scale · r_0, timestep, label)
    x0   = clip(x0_from_x · r_0 + x0_from_m · m)
    r'_i = Σ_j W[i, j] · r_j  +  W[i, m] · m  +  W[i, x0] · x0  +  W[i, z] · z

and z is the row's Gaussian noise. Every sampler is a way to fill in these numbers; no loop ever
asks which one it runs. With a learned variance (a network of 2·C output channels, the second half
v in [−1, 1]) the z-coefficient of r_0 is multiplied, element by element, by

    exp( log_sigma_min + (v + 1)/2 · (log_sigma_max − log_sigma_min) )

A program is float64 and checks itself when it is made; it becomes float32 once, in ``table``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigurationError

__all__ = ["MAX_REGISTERS", "ProgramTable", "SamplerProgram"]

Array = NDArray[np.float64]

MAX_REGISTERS = 4  # x_t and three of history: enough for UniPC-3 and iPNDM-4

_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True, eq=False)
class ProgramTable:
    """A program in float32, as executors read it. Columns as in :class:`SamplerProgram`."""

    timesteps: NDArray[np.float32]
    input_scale: NDArray[np.float32]
    x0_from_x: NDArray[np.float32]
    x0_from_m: NDArray[np.float32]
    clip: NDArray[np.float32]
    weights: NDArray[np.float32]
    signal: NDArray[np.float32]
    noise: NDArray[np.float32]
    log_sigma_min: NDArray[np.float32]
    log_sigma_max: NDArray[np.float32]
    evaluates: NDArray[np.bool_]
    guided: NDArray[np.bool_]
    shallow: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class SamplerProgram:
    """A compiled sampler: S rows over K + 1 registers.

    Args:
        sampler: the sampler's name, for messages.
        timesteps: (S,) float64, what the network is told.
        input_scale: (S,) float64.
        x0_from_x: (S,) float64.
        x0_from_m: (S,) float64.
        clip: (S,) float64, x0 is clipped to [−clip, clip]; infinity leaves it alone.
        weights: (S, K + 1, K + 4) float64; columns r_0 … r_K, m, x0, z.
        signal: (S + 1,) float64, signal level of r_0 before each row and after the last.
        noise: (S + 1,) float64, noise level likewise.
        initial_scale: standard deviation of x_T.
        log_sigma_min, log_sigma_max: (S,) float64, or None for a fixed variance.
        evaluates: (S,) bool, whether the row calls the network; None means every row does.
        guided: (S,) bool, whether the row uses classifier-free guidance; None means every row.
        shallow: (S,) bool, whether the row evaluates only the network's outer layers, on deep
            features kept from an earlier row; None means no step caching. See ``step_cache.py``.
        keeps_variance: whether pure noise must keep exactly the level's variance. Samplers whose
            theory says otherwise (DDPM with fixed-large variance, Langevin) say False.

    Raises:
        ConfigurationError: columns of unequal length, numbers that are not finite, or a table
            that breaks an identity every sampler satisfies (see :meth:`_check_levels`).
    """

    sampler: str
    timesteps: Array
    input_scale: Array
    x0_from_x: Array
    x0_from_m: Array
    clip: Array
    weights: Array
    signal: Array
    noise: Array
    initial_scale: float = 1.0
    log_sigma_min: Array | None = None
    log_sigma_max: Array | None = None
    evaluates: NDArray[np.bool_] | None = None
    guided: NDArray[np.bool_] | None = None
    shallow: NDArray[np.bool_] | None = None
    keeps_variance: bool = True

    def __post_init__(self) -> None:
        self._check_shapes()
        self._check_levels()

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def registers(self) -> int:
        """K + 1, how many registers a lane needs."""
        return int(self.weights.shape[1])

    @property
    def learns_variance(self) -> bool:
        """Whether the network's second half of channels sets the z-coefficient."""
        return self.log_sigma_min is not None

    @property
    def caches(self) -> bool:
        """Whether deep features are kept from row to row."""
        return self.shallow is not None

    @property
    def evaluations(self) -> int:
        """Network evaluations an image costs, guidance aside."""
        return len(self) if self.evaluates is None else int(self.evaluates.sum())

    @cached_property
    def table(self) -> ProgramTable:
        """The program in float32: the one place where precision is dropped."""
        rows = len(self)
        ones, zeros = np.ones(rows, np.bool_), np.zeros(rows)
        single = {
            name: np.ascontiguousarray(column, dtype=np.float32)
            for name, column in (
                ("timesteps", self.timesteps),
                ("input_scale", self.input_scale),
                ("x0_from_x", self.x0_from_x),
                ("x0_from_m", self.x0_from_m),
                ("clip", self.clip),
                ("weights", self.weights),
                ("signal", self.signal),
                ("noise", self.noise),
                ("log_sigma_min", zeros if self.log_sigma_min is None else self.log_sigma_min),
                ("log_sigma_max", zeros if self.log_sigma_max is None else self.log_sigma_max),
            )
        }
        return ProgramTable(
            **single,
            evaluates=ones if self.evaluates is None else self.evaluates,
            guided=ones if self.guided is None else self.guided,
            shallow=~ones if self.shallow is None else self.shallow,
        )

    def _check_shapes(self) -> None:
        rows, registers = len(self), self.weights.shape[1]
        expected = {
            "input_scale": (rows,),
            "x0_from_x": (rows,),
            "x0_from_m": (rows,),
            "clip": (rows,),
            "weights": (rows, registers, registers + 3),
            "signal": (rows + 1,),
            "noise": (rows + 1,),
        }
        for name in ("log_sigma_min", "log_sigma_max", "evaluates", "guided", "shallow"):
            if getattr(self, name) is not None:
                expected[name] = (rows,)
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                self._refuse(f"column {name} has shape {found}; expected {shape}")
        if not 1 <= registers <= MAX_REGISTERS:
            self._refuse(f"{registers} registers; executors hold 1 to {MAX_REGISTERS}")
        for name in ("timesteps", *expected):
            column = getattr(self, name)
            if name != "clip" and not np.isfinite(column).all():
                row = int(np.argwhere(~np.isfinite(column))[0][0])
                self._refuse(f"column {name} is not finite at row {row}")
        if self.shallow is not None:
            whole = self.table.evaluates & ~self.shallow
            if (self.shallow & (np.cumsum(whole) == 0)).any():
                self._refuse("a row wants deep features before any were kept")
        if not (self.clip > 0).all():
            self._refuse("column clip must be positive; use infinity for no clipping")

    def _check_levels(self) -> None:
        """Check what holds for every correct sampler, whatever its formula.

        A perfect network on a constant image without noise must carry the image through the
        signal levels exactly; on pure noise it must carry the variance through the noise levels
        exactly (``keeps_variance``). Both are propagated through the whole table, history
        registers included: the first as a vector, the second as a factor F of the covariance
        F·Fᵀ (a factor, because variances that cancel would lose half the digits).
        """
        registers = self.registers
        clean = np.zeros(registers)
        clean[0] = self.signal[0]
        factor = np.zeros((registers, registers))
        factor[0, 0] = self.noise[0]
        checks_variance = self.keeps_variance and not self.learns_variance
        for row in range(len(self)):
            W = self.weights[row]
            linear, from_m, from_x0 = W[:, :registers].copy(), W[:, registers], W[:, registers + 1]
            intercept = 0.0
            if self.evaluates is None or self.evaluates[row]:
                # m that makes x0 = 1 on the clean path, and 0 on pure noise: intercept + slope·r_0
                intercept = 1.0 / self.x0_from_m[row]
                linear[:, 0] -= from_m * (self.x0_from_x[row] / self.x0_from_m[row])
            clean = linear @ clean + from_m * intercept + from_x0
            self._check_level("signal", row, clean[0], self.signal[row + 1])
            if checks_variance:
                factor = linear @ factor
                from_z = W[:, registers + 2]
                if from_z.any():
                    wide = np.column_stack([factor, from_z])
                    factor = np.asarray(np.linalg.qr(wide.T, mode="r")).T
                self._check_level("noise", row, np.linalg.norm(factor[0]), self.noise[row + 1])

    def _check_level(self, name: str, row: int, found: Any, expected: Any) -> None:
        scale = max(1.0, float(getattr(self, name).max()))
        if abs(found - expected) > _TOLERANCE * scale:
            self._refuse(
                f"row {row} leaves {name} level {found:.12g} where the trajectory says "
                f"{expected:.12g}"
            )

    def _refuse(self, reason: str) -> None:
        raise ConfigurationError(
            f"the {self.sampler} program is not a sampler: {reason}. A program built by this "
            "library never does this; check the weights of a hand-made table."
        )
