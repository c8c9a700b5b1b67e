"""A measurement in a fresh interpreter: the code prints one JSON object on its last line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from ddpm_runtime.errors import BackendError

__all__ = ["run_fresh"]


def run_fresh(
    code: str, *arguments: str, environment: Mapping[str, str] | None = None, timeout_s: float = 600
) -> dict[str, Any]:
    """Run code in this interpreter's twin; return its object, with ``process_s`` added.

    Args:
        code: prints a JSON object on its last line.
        *arguments: its ``sys.argv[1:]``.
        environment: variables to set beside this process's own.
        timeout_s: end it after this long.

    Raises:
        BackendError: it failed; the message has the last line of what it said.
    """
    began = time.perf_counter()
    done = subprocess.run(  # noqa: S603  # this interpreter, our own code
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BackendError(f"a measurement in a fresh process failed: {said}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {**found, "process_s": seconds}
