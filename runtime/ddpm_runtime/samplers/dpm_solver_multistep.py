"""DPM-Solver++ with history: 2M, 3M, and the stochastic 2M.

Over λ = log(signal / noise) the exact solution of the diffusion SDE/ODE between two levels is

    x_s = (noise_s / noise_t)·e^(−ηh)·x_t + signal_s·∫₀¹ H·e^(−H(1−u))·x_0(λ_t + u·h) du
          + noise_s·√(1 − e^(−2ηh))·z,               h = λ_s − λ_t,   H = (1 + η)·h

(η = 0 is the ODE, η = 1 the SDE.) x_0 is replaced by a polynomial through this and the previous
network answers, x_0(u) ≈ D_0 + D_1·u + D_2·u²; the integral of u^k is then k!·H·φ_{k+1}(−H).

    1     D_0
    2M    D_0 and the difference D_1, integrated ("heun") or, as the paper has it, at u = ½
          ("midpoint": H·φ_1/2 in place of H·φ_2)
    3M    D_0, D_1, D_2 of the parabola through three answers

The published code of 3M (and with it diffusers and k-diffusion) weighs D_2 by φ_3 where the
integral gives 2·φ_3, which makes it second order; ``published=True`` is that one.

The first steps have less history and use a lower order; so does the last step to noise 0, whose
h is infinite (order 1: x_s = signal_s·x_0) and, in fewer than 15 steps, the one before it (at most
2), as the authors' code and diffusers do.

Sources: Lu et al., "DPM-Solver++", arXiv 2211.01095 Algorithm 2 (2M) and §5, eq. 19 (SDE-2M); the
general η: k-diffusion ``sample_dpmpp_2m_sde``; 3M: the authors' code. Order 2 and 3 (the
stochastic one: 2 in law, measured on a linear network); one network evaluation a step.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import choose
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import Symbols, phi, program_from_weights, usable_orders
from .ddim import checked_eta

__all__ = ["SOLVER_TYPES", "SolverType", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"]

SolverType = Literal["midpoint", "heun"]
SOLVER_TYPES: tuple[str, ...] = get_args(SolverType)
_FEW_STEPS = 15

Array = NDArray[np.float64]


def dpmpp_2m(
    trajectory: Trajectory, *, clip: float, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile DPM-Solver++(2M).

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        solver_type: "midpoint" (the paper) or "heun" (the exact integral of the line).

    Raises:
        ConfigurationError: unknown solver type.
    """
    return _multistep("dpmpp_2m", trajectory, clip, 2, solver_type)


def dpmpp_2m_sde(
    trajectory: Trajectory, *, clip: float, eta: float = 1.0, solver_type: SolverType = "midpoint"
) -> SamplerProgram:
    """Compile SDE-DPM-Solver++(2M).

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        eta: in [0, 1]; 1 is the diffusion SDE, 0 is DPM-Solver++(2M).
        solver_type: "midpoint" (the paper) or "heun" (the exact integral of the line).

    Raises:
        ConfigurationError: unknown solver type, or eta outside [0, 1].
    """
    return _multistep("dpmpp_2m_sde", trajectory, clip, 2, solver_type, eta=checked_eta(eta))


def dpmpp_3m(trajectory: Trajectory, *, clip: float, published: bool = False) -> SamplerProgram:
    """Compile DPM-Solver++(3M).

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        published: half the weight of D_2, as the authors' code, diffusers and k-diffusion have it.
    """
    return _multistep(
        "dpmpp_3m", trajectory, clip, 3, "midpoint", curvature=1.0 if published else 2.0
    )


def _multistep(
    sampler: str,
    trajectory: Trajectory,
    clip: float,
    order: int,
    solver_type: str,
    *,
    eta: float = 0.0,
    curvature: float = 2.0,
) -> SamplerProgram:
    """Registers: x_t, then the clean images of the order − 1 steps before."""
    choose("solver type", solver_type, SOLVER_TYPES)
    signal, noise, log_snr = trajectory.signal, trajectory.noise, trajectory.log_snr
    row = Symbols(order)
    history = [row.x_0, *row.r[1:]]
    weights = []
    for t, usable in enumerate(_orders(trajectory, order)):
        s = t + 1
        h = log_snr[s] - log_snr[t]
        forgotten = eta * h if eta else 0.0  # 0, also of an infinite h
        H = h + forgotten
        x_s = (noise[s] / noise[t]) * np.exp(-forgotten) * row.x_t
        x_s = x_s - signal[s] * np.expm1(-H) * row.x_0
        x_s = x_s + noise[s] * np.sqrt(-np.expm1(-2.0 * forgotten)) * row.z
        if usable > 1:
            D_1, D_2 = _derivatives(log_snr, t, history, usable)
            middle = usable == 2 and solver_type == "midpoint"
            first = 0.5 * phi(1, -H) if middle else phi(2, -H)
            x_s = x_s + signal[s] * H * (first * D_1 + curvature * phi(3, -H) * D_2)
        weights.append(np.stack([x_s, *history[:-1]]))
    return program_from_weights(sampler, trajectory, np.stack(weights), clip=clip)


def _derivatives(log_snr: Array, t: int, history: list[Array], order: int) -> tuple[Array, Array]:
    """D_1 and D_2 of the polynomial through the last clean images, in units of this step."""
    h = log_snr[t + 1] - log_snr[t]
    back_1 = (log_snr[t] - log_snr[t - 1]) / h
    recent = (history[0] - history[1]) / back_1
    if order == 2:
        return recent, np.zeros_like(recent)
    back_2 = (log_snr[t - 1] - log_snr[t - 2]) / h
    D_2 = (recent - (history[1] - history[2]) / back_2) / (back_1 + back_2)
    return recent + back_1 * D_2, D_2


def _orders(trajectory: Trajectory, order: int) -> list[int]:
    orders = usable_orders(trajectory, order)
    if trajectory.noise[-1] == 0.0 and 2 <= len(orders) < _FEW_STEPS:
        orders[-2] = min(orders[-2], 2)
    return orders
