"""The structures that host and kernels share: the mirror of update.cuh, field by field.

A program table is packed here, once, from :class:`~ddpm_runtime.program.ProgramTable`; nothing is
rounded again. A test compares every offset with what a C++ compiler says.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigurationError
from ..program import MAX_REGISTERS, SamplerProgram

__all__ = ["LANE", "PROGRESS", "ROW", "State", "pack_rows"]

EVALUATES, GUIDED, DRAWS = 1, 2, 4

ROW = np.dtype(
    [
        ("timestep", np.float32),
        ("input_scale", np.float32),
        ("x0_from_x", np.float32),
        ("x0_from_m", np.float32),
        ("clip", np.float32),
        ("log_sigma_min", np.float32),
        ("log_sigma_max", np.float32),
        ("signal", np.float32),
        ("noise", np.float32),
        ("flags", np.uint32),
        ("unused", np.uint32, 2),
        ("weights", np.float32, (MAX_REGISTERS, MAX_REGISTERS + 3)),
    ]
)

LANE = np.dtype(
    [
        ("rows", np.uint64),
        ("seed", np.uint64),
        ("index", np.uint64),
        ("known", np.uint64),
        ("mask", np.uint64),
        ("initial", np.uint64),
        ("length", np.int32),
        ("registers", np.int32),
        ("network_row", np.int32),
        ("pair_row", np.int32),
        ("label", np.int32),
        ("guidance_scale", np.float32),
        ("initial_scale", np.float32),
        ("initial_signal", np.float32),
        ("initial_noise", np.float32),
        ("unused", np.int32),
    ]
)

PROGRESS = np.dtype(
    [("next", np.int32), ("row", np.int32), ("failed", np.int32), ("unused", np.int32)]
)


class State(ctypes.Structure):
    """What every kernel works on; passed by value."""

    _fields_ = (
        ("lanes", ctypes.c_uint64),
        ("progress", ctypes.c_uint64),
        ("registers", ctypes.c_uint64),
        ("sample", ctypes.c_uint64),
        ("timestep", ctypes.c_uint64),
        ("label", ctypes.c_uint64),
        ("prediction", ctypes.c_uint64),
        ("rows_left", ctypes.c_uint64),
        ("capacity", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("prediction_size", ctypes.c_uint32),
        ("num_classes", ctypes.c_uint32),
    )


def pack_rows(program: SamplerProgram) -> NDArray[np.void]:
    """A program as the kernels read it.

    Returns:
        (S,) array of :data:`ROW`; registers the program has not are at zero.

    Raises:
        ConfigurationError: a row that does not call the network uses its answer.
    """
    table = program.table
    own, rows = program.registers, np.zeros(len(program), ROW)
    for name in ("input_scale", "x0_from_x", "x0_from_m", "clip", "log_sigma_min", "log_sigma_max"):
        rows[name] = getattr(table, name)
    rows["timestep"] = table.timesteps
    rows["signal"], rows["noise"] = table.signal[1:], table.noise[1:]
    rows["weights"][:, :own, :own] = table.weights[:, :, :own]
    rows["weights"][:, :own, MAX_REGISTERS:] = table.weights[:, :, own:]
    answers = table.weights[:, :, own : own + 2].any(axis=(1, 2))
    answers |= table.log_sigma_min != table.log_sigma_max
    if (answers & ~table.evaluates).any():
        row = int(np.argmax(answers & ~table.evaluates))
        raise ConfigurationError(
            f"row {row} of the {program.sampler} program uses the network's answer without asking "
            "for one; mark it in `evaluates`."
        )
    draws = table.weights[:, :, -1].any(axis=1)
    rows["flags"] = EVALUATES * table.evaluates + GUIDED * table.guided + DRAWS * draws
    return rows
