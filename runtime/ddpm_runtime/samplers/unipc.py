"""UniPC: a multistep predictor, and a corrector that costs no network evaluation.

With λ = log(signal / noise), h = λ_s − λ_t, r_k = (λ_{t−k} − λ_t)/h, D_k = (x_0^{t−k} − x_0^t)/r_k
and B = −h ("bh1") or e^(−h) − 1 ("bh2"):

    predictor   x_s = DDIM − signal_s·B·Σ_{k<p} ρ_k·D_k
    corrector   x_s = DDIM − signal_s·B·( Σ_{k<p} ρ_k·D_k + ρ_p·(x_0^s − x_0^t) )

with ρ from the linear system that makes both exact for polynomials. The corrector at s needs
x_0^s, the network's answer at the *predicted* x_s; the next row has it. So the corrector's other
terms travel in register 1, and the next row adds one term before it predicts: both are one row.

    r_0  the predicted x_t        r_1  the corrected x_t, less its term in x_0^t
    r_2  x_0 one step back        r_3  x_0 two steps back

As the authors' code has it, ρ_1 = ½ for the predictor of order 2 and the corrector of order 1. The
first steps have less history and a lower order, and so have the last ones of a trajectory that
ends without noise: at most as many as there are steps left. A step of infinite length in log-SNR
(from no signal) is DDIM, not corrected.

Source: Zhao et al., "UniPC", arXiv 2302.04867 Algorithms 1 and 2, data prediction (appendix A). The
predictor has order p, the corrector p + 1; one network evaluation a step.
"""

from __future__ import annotations

from math import factorial
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import choose
from ..program import SamplerProgram
from ..trajectory import Trajectory
from ._rows import Symbols, checked_order, phi, program_from_weights, to_level, usable_orders

__all__ = ["unipc"]

Order = Literal[1, 2, 3]
SolverType = Literal["bh1", "bh2"]

Array = NDArray[np.float64]


def unipc(
    trajectory: Trajectory, *, clip: float, order: Order = 2, solver_type: SolverType = "bh2"
) -> SamplerProgram:
    """Compile UniPC-p.

    Args:
        trajectory: the levels to visit.
        clip: bound of x_0, infinity for none.
        order: p of the predictor: 1, 2 or 3.
        solver_type: which B(h), "bh1" or "bh2".

    Raises:
        ConfigurationError: an order there are no registers for, or an unknown solver type.
    """
    checked_order(order, get_args(Order), "UniPC keeps that many network answers")
    choose("solver type", solver_type, get_args(SolverType))
    signal, log_snr = trajectory.signal, trajectory.log_snr
    row = Symbols(order + 1)
    history = [row.x_0, *row.r[2:]]
    x_t, weights = row.x_t, []
    for t, p in enumerate(_orders(trajectory, order)):
        s = t + 1
        ddim = to_level(x_t, row.x_0, trajectory, t, s)
        after = [ddim, row.zero, *history][: order + 1]
        h = log_snr[s] - log_snr[t]
        next_x_t = row.x_t
        if np.isfinite(h):
            back = (log_snr[t - p + 1 : t][::-1] - log_snr[t]) / h
            D = [(x_0 - row.x_0) / r for x_0, r in zip(history[1:], back, strict=False)]
            step = -signal[s] * (-h if solver_type == "bh1" else np.expm1(-h))
            predict, correct = _rho(h, back, solver_type)
            after[0] = ddim + step * _sum(predict, D)
            after[1] = ddim + step * (_sum(correct[:-1], D) - correct[-1] * row.x_0)
            next_x_t = row.r[1] + step * correct[-1] * row.x_0
        weights.append(np.stack(after))
        x_t = next_x_t
    return program_from_weights("unipc", trajectory, np.stack(weights), clip=clip)


def _rho(h: float, back: Array, solver_type: str) -> tuple[Array, Array]:
    """The weights ρ of predictor and corrector, for a step with p − 1 answers behind it."""
    p = len(back) + 1
    z = -h
    B = z if solver_type == "bh1" else np.expm1(z)
    powers = np.arange(p)[:, None]
    R = np.append(back, 1.0) ** powers
    b = np.array([factorial(k) * z * phi(k + 1, z) / B for k in range(1, p + 1)])
    predict = np.array([0.5]) if p == 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
    correct = np.array([0.5]) if p == 1 else np.linalg.solve(R, b)
    return predict, correct


def _sum(rho: Array, D: list[Array]) -> Array | float:
    return sum((weight * term for weight, term in zip(rho, D, strict=True)), 0.0)


def _orders(trajectory: Trajectory, order: int) -> list[int]:
    orders = usable_orders(trajectory, order)
    if trajectory.noise[-1] > 0.0:
        return orders
    return [min(p, len(orders) - t) for t, p in enumerate(orders)]
