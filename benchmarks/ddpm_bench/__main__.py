"""The ddpm-bench command (also ``python -m ddpm_bench``)."""

from __future__ import annotations

import sys

from ddpm_runtime.console import require_extra, run_command


def main() -> None:
    require_extra(("onnxruntime",), "measure an engine", "bench")
    from .cli import bench

    sys.exit(run_command(bench))


if __name__ == "__main__":
    main()
