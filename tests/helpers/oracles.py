"""The papers' own algorithms, step by step, as loops: what every compiled table must reproduce.

Nothing here imports ``ddpm_runtime`` or knows about registers and rows. Each sampler is written in
the variables its paper uses: conditional Gaussians for Ho et al., ᾱ for Song et al., σ-space for
Karras et al. and for Langevin dynamics. Solvers of second order and above: ``solver_oracles``.

``levels`` is a list of (signal, noise) pairs, one per network evaluation in the order visited, and
the pair where the last step ends. ``denoise(x, k)`` is the clean image the k-th evaluation predicts
at input x; ``z[k]`` is the noise of the k-th evaluation's row. Every sampler returns x after each
evaluation.
"""

from __future__ import annotations

import math

import numpy as np

# --- networks --------------------------------------------------------------------------------


def denoise_from(network, levels, prediction_type, clip=math.inf, sigma_data=0.5):
    """x_0 from what a network says, by the definition of each prediction type."""

    def denoise(x, k):
        signal, noise = levels[k]
        if prediction_type == "edm":
            c_skip = sigma_data**2 / (noise**2 + sigma_data**2)
            c_out = noise * sigma_data / (noise**2 + sigma_data**2) ** 0.5
            c_in = 1 / (noise**2 + sigma_data**2) ** 0.5
            x_0 = c_skip * x + c_out * network(c_in * x, k)
        elif prediction_type == "epsilon":
            x_0 = (x - noise * network(x, k)) / signal
        elif prediction_type == "v_prediction":
            # v = signal ε − noise x_0 and x = signal x_0 + noise ε; solve the two for x_0
            v = network(x, k)
            x_0 = np.linalg.solve([[signal, noise], [-noise, signal]], np.stack([x, v]))[0]
        else:
            x_0 = network(x, k)
        return np.minimum(np.maximum(x_0, -clip), clip)

    return denoise


# --- one evaluation a step, no history ---------------------------------------------------------


def conditional(x_t, x_0, level_t, level_s):
    """Mean and variance of q(x_s | x_t, x_0) by Bayes' rule for two Gaussians.

    x_s | x_0 ~ N(signal_s x_0, noise_s²) and x_t | x_s ~ N(a x_s, noise_t² − a² noise_s²).
    """
    (signal_t, noise_t), (signal_s, noise_s) = level_t, level_s
    if noise_s == 0:
        return signal_s * x_0, 0.0
    a = signal_t / signal_s
    forward_variance = noise_t**2 - a**2 * noise_s**2
    precision = 1 / noise_s**2 + a**2 / forward_variance
    mean = (signal_s * x_0 / noise_s**2 + a * x_t / forward_variance) / precision
    return mean, 1 / precision


def ddpm(levels, denoise, x, z, variance="fixed_small", v=None):
    """Ho et al. Algorithm 2; Nichol & Dhariwal eq. 15 for the learned variances."""
    out = []
    for k in range(len(levels) - 1):
        (signal_t, noise_t), (signal_s, noise_s) = levels[k], levels[k + 1]
        mean, small = conditional(x, denoise(x, k), levels[k], levels[k + 1])
        large = noise_t**2 - (signal_t / signal_s) ** 2 * noise_s**2
        if noise_s == 0:
            deviation = 0.0
        elif variance == "fixed_small":
            deviation = small**0.5
        elif variance == "fixed_large":
            deviation = large**0.5
        elif variance == "learned":
            deviation = np.exp(v[k]) ** 0.5
        else:
            u = (v[k] + 1) / 2
            deviation = large ** (u / 2) * small ** ((1 - u) / 2)
        x = mean + deviation * z[k]
        out.append(x)
    return out


def ddim(levels, denoise, x, z, eta=0.0):
    """Song et al. eq. 12 and 16, in ᾱ; for levels that are not variance preserving, in σ."""
    out = []
    for k in range(len(levels) - 1):
        (signal_t, noise_t), (signal_s, noise_s) = levels[k], levels[k + 1]
        x_0 = denoise(x, k)
        epsilon = (x - signal_t * x_0) / noise_t
        a_t = 1 / (1 + (noise_t / signal_t) ** 2) if signal_t else 0.0
        a_s = 1 / (1 + (noise_s / signal_s) ** 2)
        sigma = eta * ((1 - a_s) / (1 - a_t)) ** 0.5 * (1 - a_t / a_s) ** 0.5
        x = a_s**0.5 * x_0 + (1 - a_s - sigma**2) ** 0.5 * epsilon + sigma * z[k]
        x = x * signal_s / a_s**0.5  # 1 on a variance-preserving level
        out.append(x)
    return out


def euler_ancestral(levels, denoise, x, z, eta=1.0):
    """k-diffusion's sample_euler_ancestral with get_ancestral_step, on x / signal."""
    out = []
    for k in range(len(levels) - 1):
        (signal_t, noise_t), (signal_s, noise_s) = levels[k], levels[k + 1]
        sigma_t, sigma_s = noise_t / signal_t, noise_s / signal_s
        sigma_up = min(sigma_s, eta * (sigma_s**2 * (sigma_t**2 - sigma_s**2) / sigma_t**2) ** 0.5)
        sigma_down = (sigma_s**2 - sigma_up**2) ** 0.5
        y = x / signal_t
        slope = (y - denoise(x, k)) / sigma_t
        x = signal_s * (y + slope * (sigma_down - sigma_t) + z[k] * sigma_up)
        out.append(x)
    return out


def euler(levels, denoise, x, z):
    return euler_ancestral(levels, denoise, x, z, eta=0.0)


# --- Langevin ---------------------------------------------------------------------------------


def langevin(levels, denoise, x, z, inner_steps=5, step_size=0.2):
    """Song & Ermon Algorithm 1 in σ-space, α_i = step_size·σ_i²; the last evaluation denoises."""
    out = []
    steps = len(levels) - 2
    for k in range(steps):
        signal, noise = levels[k]
        sigma = noise / signal
        score = (denoise(x, k) - x / signal) / sigma**2
        alpha = step_size * sigma**2
        y = x / signal + alpha / 2 * score + alpha**0.5 * z[k]
        x = y * levels[k + 1][0]
        out.append(x)
    return [*out, levels[-1][0] * denoise(x, steps)]


def predictor_corrector(levels, denoise, x, z, corrector_steps=1, snr=0.16):
    """Song et al. Algorithms 3 and 5's corrector before each ancestral step."""
    out, k = [], 0
    while k < len(levels) - 1:
        for _ in range(corrector_steps):
            signal, noise = levels[k]
            score = -(x - signal * denoise(x, k)) / noise / noise
            step = 2 * (snr * noise) ** 2
            x = x + step * score + (2 * step) ** 0.5 * z[k]
            out.append(x)
            k += 1
        mean, variance = conditional(x, denoise(x, k), levels[k], levels[k + 1])
        x = mean + variance**0.5 * z[k]
        out.append(x)
        k += 1
    return out
