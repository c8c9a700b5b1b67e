"""The ddpm-export command (also ``python -m ddpm_export``)."""

from __future__ import annotations

import sys

from ddpm_runtime.console import require_extra, run_command

from .destination import looks_like_engine

_FOR_A_CHECKPOINT = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors")
_FOR_AN_ENGINE = ("onnx", "onnxruntime", "ml_dtypes")  # its plan alone needs none of them


def main() -> None:
    from .cli import export_command

    arguments = list(sys.argv[1:])
    asked = export_command.make_context("ddpm-export", arguments, resilient_parsing=True).params
    source = asked.get("checkpoint")
    if source is None or not looks_like_engine(source):
        require_extra(_FOR_A_CHECKPOINT, "export a network", "export")
    elif asked.get("precision") or asked.get("step_cache"):
        require_extra(_FOR_AN_ENGINE, "write an engine in another form", "precision")
    sys.exit(run_command(export_command))


if __name__ == "__main__":
    main()
