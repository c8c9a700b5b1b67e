"""A float64 reading of the row definition in ``ddpm_runtime.program``: the tests' own executor.

Written from that docstring alone. It shares no code with ``HostLanes``, and float64 is what the
bars of 1e-9 and 1e-10 need.
"""

from __future__ import annotations

import numpy as np


def advance(program, row, registers, m, z, v=None):
    """One row on registers (K + 1, ...); m, z and the learned variance v are given."""
    x_0 = program.x0_from_x[row] * registers[0] + program.x0_from_m[row] * m
    x_0 = np.clip(x_0, -program.clip[row], program.clip[row])
    K = program.registers
    after = []
    for i in range(K):
        W = program.weights[row, i]
        r = sum(W[j] * registers[j] for j in range(K))
        deviation = 1.0
        if i == 0 and v is not None:
            low, high = program.log_sigma_min[row], program.log_sigma_max[row]
            deviation = np.exp(low + (v + 1) / 2 * (high - low))
        after.append(r + W[K] * m + W[K + 1] * x_0 + W[K + 2] * deviation * z)
    return np.stack(after)


def run(program, network, x_T, draws):
    """All rows. ``network(x, timestep, row)`` gets the scaled input; ``draws`` is (S, ...).

    Returns:
        x_t after every row, (S, ...).
    """
    registers = np.zeros((program.registers, *np.shape(x_T)))
    registers[0] = x_T
    x = []
    for row in range(len(program)):
        m = 0.0
        if program.evaluates is None or program.evaluates[row]:
            m = network(program.input_scale[row] * registers[0], program.timesteps[row], row)
        registers = advance(program, row, registers, m, draws[row])
        x.append(registers[0].copy())
    return np.stack(x)
