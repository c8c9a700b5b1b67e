"""The ddpm-run command (also ``python -m ddpm_runtime``)."""

from __future__ import annotations

import sys

from .console import run_command


def main() -> None:
    from .cli import run

    sys.exit(run_command(run))


if __name__ == "__main__":
    main()
