"""The ddpm-train command (also ``python -m ddpm_train``)."""

from __future__ import annotations

import sys

from ddpm_runtime.console import require_extra, run_command


def main() -> None:
    require_extra(("torch", "safetensors"), "train a network", "train")
    from .cli import train_command

    sys.exit(run_command(train_command))


if __name__ == "__main__":
    main()
