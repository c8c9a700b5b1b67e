"""What NVRTC makes of the source: PTX without fused or flushed arithmetic, run instruction by
instruction, with every access checked, and compared bit for bit with the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers_cuda.host_build import SOURCES
from helpers_cuda.pairs import assert_same, both, requests
from helpers_cuda.programs import random_program, real_programs
from helpers_cuda.ptx import PtxError, PtxKernel, PtxKernels

from ddpm_runtime.cuda.compiler import MODULES, compile_module

ARCHITECTURES = (75, 90, 120)  # two generations of compiler: sm_120 comes from a newer one


@pytest.fixture(scope="module", params=[*ARCHITECTURES, "nvcc"])
def texts(request, tmp_path_factory) -> list[str]:
    if request.param == "nvcc":
        return texts_of_nvcc(tmp_path_factory.mktemp("nvcc"))
    return [
        compile_module(module, request.param, target="ptx").image.rstrip(b"\0").decode()
        for module in MODULES
    ]


def texts_of_nvcc(directory: Path) -> list[str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    texts = []
    for module, defines in MODULES.items():
        output = directory / f"{module}.ptx"
        flags = ("-std=c++17", "-fmad=false", "-arch=compute_90", "-Werror", "all-warnings")
        subprocess.run(
            [nvcc, *flags, *defines, "-ptx", "-o", str(output), str(SOURCES / "update.cu")],
            check=True,
            timeout=120,
        )
        texts.append(output.read_text())
    return texts


@pytest.fixture
def interpreted(texts) -> PtxKernels:
    return PtxKernels(texts, lambda address: None)


def test_no_arithmetic_is_fused_or_flushed(texts):
    for text in texts:
        operations = set(re.findall(r"^\s+(?:@!?%p\d+ )?([a-z][\w.]*)", text, re.MULTILINE))
        assert not [o for o in operations if "fma" in o or "ftz" in o or "approx" in o]
        arithmetic = {o for o in operations if re.match(r"(add|sub|mul|div|sqrt)\..*f32", o)}
        assert all(".rn." in operation for operation in arithmetic), arithmetic


@pytest.mark.parametrize("image", [(1, 2, 4), (1, 3, 3)], ids=["vector", "scalar"])
@pytest.mark.parametrize("learned", [False, True])
def test_the_interpreted_kernels_give_the_bits_of_the_host(interpreted, image, learned):
    programs = [random_program(k, 4, k, learned=learned) for k in (1, 2, 3, 4)]
    host, cuda, _ = both(
        interpreted,
        requests(programs, count=5, classes=3, guided=True),
        image,
        capacity=3,
        rows=4,
        graph_level="L2",
        num_classes=3,
        prediction_channels=2 if learned else 1,
    )
    assert_same(host, cuda)
    assert interpreted.threads_run > 10_000


def test_the_interpreted_kernels_run_every_sampler(interpreted):
    programs = real_programs(steps=3)
    host, cuda, _ = both(
        interpreted, requests(programs.values(), count=len(programs)), (1, 2, 2), capacity=4
    )
    assert_same(host, cuda)


def test_the_interpreter_refuses_an_access_outside_every_allocation(interpreted):
    kernels = interpreted
    launch = kernels.launch

    def launch_too_wide(name, grid, threads, parameters):
        if "update" in name:  # an image of more elements than there are
            parameters[0] = parameters[0][:68] + (1 << 20).to_bytes(4, "little") + b"\0" * 8
            grid = ((1 << 20) // threads, 1)
        launch(name, grid, threads, parameters)

    kernels.launch = launch_too_wide
    with pytest.raises(PtxError, match="outside every allocation"):
        both(kernels, requests([random_program(1, 2, 0)], count=1), (1, 3, 3), capacity=1)


def test_the_interpreter_refuses_a_misaligned_access(interpreted):
    kernels = interpreted
    kernels.kernels["ddpm_update_scalar"] = kernels.kernels["ddpm_update_vector"]
    with pytest.raises(PtxError, match="misaligned"):
        both(kernels, requests([random_program(1, 2, 0)], count=2), (1, 3, 3), capacity=2)


def test_the_interpreter_refuses_fused_arithmetic(texts):
    fused = re.sub(
        r"mul\.rn\.f32\s+(%\w+), (%\w+), (%\w+);", r"fma.rn.f32 \1, \2, \3, \3;", texts[0]
    )
    with pytest.raises(PtxError, match=r"fma\.rn\.f32"):
        PtxKernel(fused, "ddpm_update_vector")
