"""A Gaussian mixture in one dimension: its best denoiser, its flow and its chain, all exact.

Data: weights w_i, means μ_i, deviations s_i. At a level (signal, noise) the best x_0 is

    E[x_0 | x] = Σ_i p_i(x) · (μ_i + signal·s_i² / v_i · (x − signal·μ_i))
    p_i(x) ∝ w_i · N(x; signal·μ_i, v_i),            v_i = signal²·s_i² + noise²
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import solve_ivp

from ddpm_runtime.trajectory import Evaluations, Trajectory

WEIGHTS = np.array([0.3, 0.5, 0.2])
MEANS = np.array([-0.7, 0.1, 0.8])
DEVIATIONS = np.array([0.12, 0.2, 0.08])


def denoiser(x, signal, noise, weights=WEIGHTS, means=MEANS, deviations=DEVIATIONS):
    """E[x_0 | x], elementwise."""
    x = np.asarray(x)[..., None]
    variance = signal**2 * deviations**2 + noise**2
    centred = x - signal * means
    log_p = np.log(weights) - centred**2 / (2 * variance) - np.log(variance) / 2
    p = np.exp(log_p - log_p.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    return (p * (means + signal * deviations**2 / variance * centred)).sum(axis=-1)


def exact_flow(x, log_snr_start, log_snr_end, **mixture):
    """The probability-flow ODE from one variance-preserving level to another.

    With x̂ = x / signal and τ = log σ it is dx̂/dτ = x̂ − E[x_0 | x̂]  (Karras et al. eq. 3).
    """

    def slope(tau, y):
        return y - denoiser(y, 1.0, np.exp(tau), **mixture)

    signal = 1 / np.sqrt(1 + np.exp(-2 * log_snr_start))
    solved = solve_ivp(
        slope, (-log_snr_start, -log_snr_end), x / signal, method="DOP853", rtol=1e-13, atol=1e-13
    )
    return solved.y[:, -1] / np.sqrt(1 + np.exp(-2 * log_snr_end))


def smooth_trajectory(log_snr):
    """A variance-preserving trajectory of a "sample" network over any levels; it is told λ."""

    def at(lam):
        signal = 1 / np.sqrt(1 + np.exp(-2 * lam))
        noise = 1 / np.sqrt(1 + np.exp(2 * lam))
        one = np.ones_like(lam)
        return Evaluations(
            timesteps=lam,
            signal=signal,
            noise=noise,
            input_scale=one,
            x0_from_x=0 * one,
            x0_from_m=one,
        )

    visited, levels = at(log_snr[:-1]), at(log_snr)
    return Trajectory(
        timesteps=visited.timesteps,
        signal=levels.signal,
        noise=levels.noise,
        input_scale=visited.input_scale,
        x0_from_x=visited.x0_from_x,
        x0_from_m=visited.x0_from_m,
        at_log_snr=at,
    )


def network(x, log_snr, row=None):
    """The denoiser as a network that is told λ."""
    return denoiser(x, 1 / np.sqrt(1 + np.exp(-2 * log_snr)), 1 / np.sqrt(1 + np.exp(2 * log_snr)))
