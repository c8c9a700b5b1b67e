"""Step caching: which rows of a program evaluate only the network's outer layers.

Deep features of a U-Net change slowly from step to step, so they are kept from one whole evaluation
for the next few. It is lossy and off unless asked for.

Source: Ma et al. (DeepCache), arXiv 2312.00858 §3.2 (the uniform 1:N strategy).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from .errors import ConfigurationError
from .program import SamplerProgram

__all__ = ["with_step_cache"]


def with_step_cache(program: SamplerProgram, interval: int) -> SamplerProgram:
    """Evaluate the whole network once every ``interval`` evaluations.

    The first evaluation is whole, and so is the first one with guidance after one without: a guided
    row needs deep features of its own.

    Args:
        program: a compiled sampler.
        interval: ≥ 1; 1 gives the program back, with every evaluation whole.

    Raises:
        ConfigurationError: interval < 1.
    """
    if interval < 1:
        raise ConfigurationError(f"cache interval must be ≥ 1 (1 is off); got {interval}.")
    if interval == 1:
        return program
    table = program.table
    shallow = np.zeros(len(program), np.bool_)
    since, keeps_guidance = interval, False
    for row in np.flatnonzero(table.evaluates):
        guided = bool(table.guided[row])
        if since >= interval or (guided and not keeps_guidance):
            since, keeps_guidance = 1, guided
        else:
            shallow[row] = True
            since += 1
    return dataclasses.replace(program, shallow=shallow)
