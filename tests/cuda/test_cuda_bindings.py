"""CudaLanes through the real cuda.bindings, over a libcuda that runs kernels on the CPU.

The simulated driver stands where cuda.bindings does, and so cannot tell whether arguments survive
the way through it. Here they go all the way to C functions with the driver's own signatures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

PROGRAM = """
import ctypes, sys
sys.path[:0] = [sys.argv[1]]
import numpy as np
from ddpm_runtime.backends import FunctionBackend
from ddpm_runtime.cuda import CudaLanes, open_device
from ddpm_runtime.images import to_uint8
from ddpm_runtime.lanes import HostLanes
from helpers_cuda.networks import SimulatedBackend, smooth_network
from helpers_cuda.pairs import assert_same, requests, run
from helpers_cuda.programs import random_program

libcuda = ctypes.CDLL("libcuda.so.1")
CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

class HostFunctions:
    '''Puts Python on a stream, as SimulatedDriver.host_function does.'''
    kept = []
    def host_function(self, stream, work):
        self.kept.append(CALLBACK(lambda data: work()))
        libcuda.cuLaunchHostFunc(ctypes.c_void_p(stream), self.kept[-1], None)
    def _call(self, name, stream):
        assert libcuda.cuStreamSynchronize(ctypes.c_void_p(stream)) == 0

network = smooth_network(3)
for image in ((2, 2, 4), (1, 3, 5)):
    programs = [random_program(k, 6, k) for k in (1, 2, 3, 4)]
    wanted = list(requests(programs, count=7, classes=3, guided=True))
    host = run(HostLanes(FunctionBackend(network, image, num_classes=3), 3), wanted)
    for level in ("L0", "L1", "L2", "auto"):
        with open_device() as device:
            assert (device.name, device.sm) == ("Fake GPU", 90)
            backend = SimulatedBackend(HostFunctions(), network, image, num_classes=3)
            with CudaLanes(device, backend, 3, graph_level=level) as lanes:
                cuda = run(lanes, wanted, rows=4)
                assert_same(host, cuda)
                pixels = run(lanes, wanted[:3], rows=9, pixels=True)
                for tag, lane in pixels.items():
                    assert (lane.pixels == to_uint8(host[tag].image)).all()
                print(level, "|", lanes.description)
"""

MEASURING = """
import sys, time
sys.path[:0] = [sys.argv[1]]
from ddpm_bench.gpu_exercise import CopyNetwork, exercise
from ddpm_bench.gpu_machine import gpu_facts
from ddpm_bench.gpu_timing import ChunkTimer
from ddpm_runtime.cuda import CudaLanes, open_device
from helpers_cuda.programs import real_programs

class Waiting(CopyNetwork):
    def enqueue(self, stream, rows):
        super().enqueue(stream, rows)
        self._driver.call("cuStreamSynchronize", stream)

with open_device() as device:
    facts = gpu_facts(device)
    print(facts["name"], facts["compute_capability"], facts["memory_bytes"], facts["cuda"])
    print(*[exercise(device, level) for level in ("L0", "L1", "L2")])
    for network in (CopyNetwork(device, (1, 4, 4)), Waiting(device, (1, 4, 4))):
        timer = ChunkTimer(device, patience_s=0.2)
        with CudaLanes(device, network, 1, graph_level="L0") as lanes:
            lanes.warm_up()
            lanes.start(real_programs(steps=9)["ddim, clip 1"], seed=0, index=0)
            lanes.around_chunk = timer.held
            lanes.advance(4)
        print(timer.interrupted, timer.elapsed_ms() > 0)
        timer.close()
"""


@pytest.fixture(scope="module")
def fake_libcuda(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("libcuda")
    compiler = shutil.which("g++")
    assert compiler, "g++ is needed for the CUDA tests: apt-get install g++"
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"),
            *(str(HERE / "helpers_cuda" / "fake_libcuda.cpp"), "-ldl"),
            *("-o", str(directory / "libcuda.so.1")),
        ],
        check=True,
        timeout=120,
    )
    return directory


def run_under(libcuda: Path, libraries: list[Path], program: str) -> list[str]:
    step, loop = libraries
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libcuda),
        "DDPM_STEP": str(step),
        "DDPM_LOOP": str(loop),
    }
    answer = subprocess.run(
        [sys.executable, "-c", program, str(HERE)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()


def test_the_real_bindings_carry_every_argument_to_the_driver(fake_libcuda, host_libraries):
    said = run_under(fake_libcuda, host_libraries, PROGRAM)
    kernels = "kernels sm_90, shipped"
    loop_graph = f"L2, one graph with a conditional loop; {kernels}"
    expected = [
        f"L0 | L0, plain launches; {kernels}",
        f"L1 | L1, one graph a row; {kernels}",
        f"L2 | {loop_graph}",
        f"auto | {loop_graph}",
    ]
    assert said == expected * 2


def test_the_real_bindings_carry_what_a_measurement_asks(fake_libcuda, host_libraries):
    """And let other threads run while they wait: else nobody could let a held stream go."""
    assert run_under(fake_libcuda, host_libraries, MEASURING) == [
        "Fake GPU 9.0 4000 13.0",
        "14 14 14",
        "False True",
        "True True",
    ]
