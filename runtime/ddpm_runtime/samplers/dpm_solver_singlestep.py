"""DPM-Solver and DPM-Solver++ without history: 2S and 3S.

Each step t → s evaluates the network at t and at one or two levels inside the step, at ½ of it in
log-SNR, or at ⅓ and ⅔. λ = log(signal / noise), h = λ_s − λ_t; a stage at the fraction r has r·h.

    DPM-Solver++   N = x_0,   w_k(level, h) =  signal_level · h·φ_k(−h)
    DPM-Solver     N = ε,     w_k(level, h) = −noise_level · h·φ_k(h)

    2S   X_1 = DDIM to r
         x_s = DDIM to s + w_1(s, h)/(2r) · (N_1 − N_0)                           "midpoint"
               DDIM to s + w_2(s, h)/r · (N_1 − N_0)                              "heun"
    3S   X_1 = DDIM to r_1
         X_2 = DDIM to r_2 + w_2(r_2, r_2·h)·(r_2/r_1) · (N_1 − N_0)
         x_s = DDIM to s + w_2(s, h)/r_2 · (N_2 − N_0)                            "midpoint"
               DDIM to s + w_2(s, h)·D_1 + 2·w_3(s, h)·D_2                        "heun"
               (D_1, D_2 of the parabola through N_0, N_1, N_2)

A step that ends without noise, or starts without signal, is infinitely long in log-SNR and has no
inside: it is one DDIM step, as in the reference codes. Timesteps inside are fractional.

Sources: Lu et al., "DPM-Solver", arXiv 2206.00927 Algorithms 1 and 2 (DPM-Solver-2, -3); Lu et al.,
"DPM-Solver++", arXiv 2211.01095 Algorithm 1 (2S); 3S of ++ and the "heun" forms: the authors' code
("taylor" there). Order 2 and 3; two and three evaluations a step, one for the last.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import choose
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import epsilon_of, phi, runge_kutta_program, to_level
from .dpm_solver_multistep import SOLVER_TYPES, SolverType

__all__ = ["dpm_solver_2s", "dpm_solver_3s", "dpmpp_2s", "dpmpp_3s"]

Array = NDArray[np.float64]


def dpmpp_2s(
    trajectory: Trajectory, *, clip: float, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile DPM-Solver++(2S).

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        solver_type: "midpoint" or "heun".

    Raises:
        ConfigurationError: unknown solver type.
    """
    return _singlestep("dpmpp_2s", trajectory, clip, (1 / 2,), solver_type, of_x_0=True)


def dpmpp_3s(
    trajectory: Trajectory, *, clip: float, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile DPM-Solver++(3S). Arguments as for :func:`dpmpp_2s`."""
    return _singlestep("dpmpp_3s", trajectory, clip, (1 / 3, 2 / 3), solver_type, of_x_0=True)


def dpm_solver_2s(
    trajectory: Trajectory, *, clip: float, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile DPM-Solver-2. Arguments as for :func:`dpmpp_2s`."""
    return _singlestep("dpm_solver_2s", trajectory, clip, (1 / 2,), solver_type, of_x_0=False)


def dpm_solver_3s(
    trajectory: Trajectory, *, clip: float, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile DPM-Solver-3. Arguments as for :func:`dpmpp_2s`."""
    fractions = (1 / 3, 2 / 3)
    return _singlestep("dpm_solver_3s", trajectory, clip, fractions, solver_type, of_x_0=False)


def _singlestep(
    sampler: str,
    trajectory: Trajectory,
    clip: float,
    fractions: tuple[float, ...],
    solver_type: str,
    *,
    of_x_0: bool,
) -> SamplerProgram:
    choose("solver type", solver_type, SOLVER_TYPES)
    visited = trajectory.refine(fractions)
    step = _second_order if len(fractions) == 1 else _third_order
    x_t, x_0 = np.eye(2)
    steps, start = [], 0
    for length in np.diff(trajectory.log_snr):
        if np.isfinite(length):
            stages = _Stages(visited, start, len(fractions) + 1, of_x_0)
            steps.append(step(stages, solver_type))
        else:
            steps.append([to_level(x_t, x_0, visited, start, start + 1)])
        start += len(steps[-1])
    return runge_kutta_program(sampler, visited, steps, clip=clip)


class _Stages:
    """One step of n stages, over the unit vectors of (x_t, x_0 of stage 0, …, of stage n − 1)."""

    def __init__(self, visited: Trajectory, start: int, stages: int, of_x_0: bool) -> None:
        self._visited, self._start, self._of_x_0 = visited, start, of_x_0
        self._x_t, *self._x_0 = np.eye(stages + 1)
        log_snr = visited.log_snr[start : start + stages + 1]
        self.fractions = (log_snr - log_snr[0]) / (log_snr[-1] - log_snr[0])
        self._lengths = log_snr - log_snr[0]

    def ddim(self, stage: int) -> Array:
        """DDIM from the start of the step to the level of a stage."""
        return to_level(self._x_t, self._x_0[0], self._visited, self._start, self._start + stage)

    def answer(self, stage: int, X: Array) -> Array:
        """N: what the network says at a stage, whose input is X."""
        if self._of_x_0:
            return self._x_0[stage]
        at = self._start + stage
        return epsilon_of(X, self._x_0[stage], self._visited.signal[at], self._visited.noise[at])

    def difference(self, stage: int, X: Array) -> Array:
        """N_stage − N_0."""
        return self.answer(stage, X) - self.answer(0, self._x_t)

    def weight(self, k: int, stage: int) -> float:
        """w_k for the way from the start of the step to the level of a stage."""
        h, at = float(self._lengths[stage]), self._start + stage
        if self._of_x_0:
            return float(self._visited.signal[at]) * h * phi(k, -h)
        return -float(self._visited.noise[at]) * h * phi(k, h)


def _second_order(stages: _Stages, solver_type: str) -> list[Array]:
    r = stages.fractions[1]
    X_1 = stages.ddim(1)
    first = 0.5 * stages.weight(1, 2) if solver_type == "midpoint" else stages.weight(2, 2)
    return [X_1, stages.ddim(2) + first / r * stages.difference(1, X_1)]


def _third_order(stages: _Stages, solver_type: str) -> list[Array]:
    r_1, r_2 = stages.fractions[1], stages.fractions[2]
    X_1 = stages.ddim(1)
    slope_1 = stages.difference(1, X_1) / r_1
    X_2 = stages.ddim(2) + stages.weight(2, 2) * r_2 * slope_1
    slope_2 = stages.difference(2, X_2) / r_2
    x_s = stages.ddim(3)
    if solver_type == "midpoint":
        return [X_1, X_2, x_s + stages.weight(2, 3) * slope_2]
    D_2 = (slope_2 - slope_1) / (r_2 - r_1)
    D_1 = slope_1 - r_1 * D_2
    return [X_1, X_2, x_s + stages.weight(2, 3) * D_1 + 2.0 * stages.weight(3, 3) * D_2]
