"""The learning rate of every step: warm-up, then constant or a cosine to zero."""

from __future__ import annotations

import math

from .config import OptimizationConfig

__all__ = ["learning_rate_at"]


def learning_rate_at(step: int, config: OptimizationConfig) -> float:
    """The learning rate of step number ``step`` (0, 1, ...).

    Rises linearly over ``warmup_steps``; with the cosine decay it then falls as
    (1 + cos(π · share of the remaining steps done)) / 2, to just above zero on the last step.

    Source: Loshchilov & Hutter, arXiv 1608.03983 eq. 5 (one cycle, η_min = 0).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
