"""ddpm_runtime/backends/forks.py: a forked child ends, whatever its parent opened."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import gc, os, signal, sys, warnings
warnings.simplefilter("ignore")
from ddpm_runtime import Engine
gc.disable()
engine = Engine.load(sys.argv[1], backend=sys.argv[2], threads=2)
engine.sample(3, steps=2)
engine.sample(8, steps=2)
cycle = [engine]
cycle.append(cycle)
del engine, cycle
child = os.fork()
if child == 0:
    signal.alarm(20)
    gc.collect()
    os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_child_process_never_destroys_what_its_parent_opened(shipped_engine_path, backend):
    # destructors wait for threads that a fork does not copy: a garbage collection in the child
    # would never end
    pytest.importorskip(backend, reason=f"{backend} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(shipped_engine_path), backend],
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "0", done.stderr
