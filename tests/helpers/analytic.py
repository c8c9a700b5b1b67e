"""Networks whose right answer is known: Gaussian data, in closed form.

For x_0 ~ N(mean, deviation²·I) and x_t = signal·x_0 + noise·ε, the best prediction of ε is

    E[ε | x_t] = noise · (x_t − signal·mean) / (signal²·deviation² + noise²)
"""

from __future__ import annotations

import numpy as np


def gaussian_epsilon(schedule, mean: float = 0.0, deviation: float = 0.5):
    """A FunctionBackend function for a DDPM schedule."""

    def network(sample, timestep, label):
        signal_squared = schedule.alphas_cumprod[timestep.astype(int)][:, None, None, None]
        noise = np.sqrt(1 - signal_squared)
        centred = sample - np.sqrt(signal_squared) * mean
        return noise * centred / (signal_squared * deviation**2 + noise**2)

    return network
