"""The kernels' source through g++: known answers, and what makes the comparison mean something."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers_cuda.host_build import UNDEFINED, HostKernels, build, contracting_flags
from helpers_cuda.pairs import both, requests, same_bits
from helpers_cuda.programs import random_program, real_programs

from ddpm_runtime.cuda.layout import LANE, PROGRESS, ROW, State
from ddpm_runtime.noise import noise
from ddpm_runtime.portable_math import exp

HERE = Path(__file__).parent


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def normals(kernels: HostKernels, seed: int, index: int, draw: int, size: int) -> np.ndarray:
    out = np.empty(-(-size // 4) * 4, np.float32)
    kernels.step.ddpm_normals(
        *(ctypes.c_uint64(seed), ctypes.c_uint64(index), ctypes.c_uint32(draw)),
        *(ctypes.c_uint32(len(out) // 4), pointer(out)),
    )
    return out[:size]


def test_philox_gives_the_known_answers_of_random123(host_kernels):
    known = (  # kat_vectors of the Random123 distribution, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    )
    for counter, key, expected in known:
        out = np.empty(4, np.uint32)
        host_kernels.step.ddpm_philox(
            pointer(np.array(counter, np.uint32)), pointer(np.array(key, np.uint32)), pointer(out)
        )
        assert tuple(out) == expected


@pytest.mark.parametrize(
    ("seed", "index", "draw", "size"),
    [(0, 0, 0, 1 << 20), (2**64 - 1, 2**64 - 1, 2**32 - 1, 4099), (42, 123456789012, 17, 3071)],
)
def test_noise_is_that_of_the_host_bit_for_bit(host_kernels, seed, index, draw, size):
    assert same_bits(normals(host_kernels, seed, index, draw, size), noise(seed, index, draw, size))


def test_exp_is_that_of_the_host_bit_for_bit(host_kernels):
    spread = np.linspace(-100, 100, 1_000_003)
    x = np.concatenate([spread, [np.inf, -np.inf, np.nan, -87, 88, 0.0, -0.0]]).astype(np.float32)
    out = np.empty_like(x)
    host_kernels.step.ddpm_exponentials(pointer(x), ctypes.c_uint32(len(x)), pointer(out))
    with np.errstate(all="ignore"):
        assert same_bits(out, exp(x))


@pytest.mark.parametrize(
    ("name", "fields", "size"),
    [
        ("Row", {k: v[1] for k, v in ROW.fields.items()}, ROW.itemsize),
        ("Lane", {k: v[1] for k, v in LANE.fields.items()}, LANE.itemsize),
        ("Progress", {k: v[1] for k, v in PROGRESS.fields.items()}, PROGRESS.itemsize),
        (
            "State",
            {name: getattr(State, name).offset for name, _ in State._fields_},
            ctypes.sizeof(State),
        ),
    ],
)
def test_the_structures_are_laid_out_as_the_compiler_does(host_kernels, name, fields, size):
    for field, offset in fields.items():
        assert host_kernels.step.ddpm_offset(f"{name}.{field}".encode()) == offset, field
    sizes = (ctypes.c_uint32 * 4)()
    host_kernels.step.ddpm_sizes(sizes)
    assert dict(zip(("Row", "Lane", "Progress", "State"), sizes, strict=True))[name] == size


def test_a_compiler_that_fuses_products_and_sums_is_noticed(tmp_path):
    """The negative control: without separate roundings the comparison must fail."""
    fused = HostKernels(build(tmp_path, contracting_flags()))
    assert not same_bits(normals(fused, 0, 0, 0, 1 << 16), noise(0, 0, 0, 1 << 16))
    program = random_program(3, 7, 0)
    host, cuda, _ = both(fused, requests([program], count=1), (2, 4, 6), capacity=1)
    assert not same_bits(cuda[0].image, host[0].image)


def test_no_behaviour_is_undefined(tmp_path):
    """Every kind of row under UBSan, which ends the process at the first finding."""
    build(tmp_path, UNDEFINED)
    code = f"""
import sys
sys.path[:0] = [{str(HERE)!r}]
from pathlib import Path
from test_cuda_kernels import run_everything
from helpers_cuda.host_build import HostKernels
run_everything(HostKernels([Path({str(tmp_path)!r}) / name for name in ("step.so", "loop.so")]))
print("all rows done")
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert "runtime error" not in process.stderr
    assert process.stdout.strip() == "all rows done", process.stderr


def run_everything(kernels: HostKernels) -> None:
    """Every kind of row, both widths, NaN included."""
    for image in ((2, 2, 6), (1, 3, 5)):
        for learned in (False, True):
            programs = [random_program(k, 5, k, learned=learned) for k in (1, 2, 3, 4)]
            if not learned:
                programs += list(real_programs(steps=4).values())
            both(
                kernels,
                requests(programs, count=len(programs), classes=3, guided=True),
                image,
                capacity=3,
                rows=3,
                num_classes=3,
                prediction_channels=image[0] * (2 if learned else 1),
            )
    broken = lambda sample, timestep, label: sample * np.float32(np.nan)  # noqa: E731
    plain = [random_program(2, 3, 0)]
    both(kernels, requests(plain, count=1), (1, 2, 2), capacity=1, network=broken)
    normals(kernels, 2**64 - 1, 2**64 - 1, 2**32 - 1, 4096)
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30, 0], np.float32)
    kernels.step.ddpm_exponentials(pointer(x), ctypes.c_uint32(len(x)), pointer(x.copy()))
