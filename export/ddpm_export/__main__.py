"""The ddpm-export command (also ``python -m ddpm_export``)."""

from __future__ import annotations

import sys

from ddpm_runtime.console import require_extra, run_command


def main() -> None:
    require_extra(
        ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors"), "export a network", "export"
    )
    from .cli import export_command

    sys.exit(run_command(export_command))


if __name__ == "__main__":
    main()
