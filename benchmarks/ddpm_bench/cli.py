"""ddpm-bench: one sub-command a question. Results on stdout, progress on stderr.

A new sub-command is a file ``NAME_command.py`` beside this one, and one line below.
Exit codes: 0 done; 1 the work failed; 2 the command was wrong; 130 interrupted.
"""

from __future__ import annotations

import click

from ddpm_runtime import __version__

from .gallery_command import gallery_command
from .likelihood_command import likelihood_command
from .overhead_command import overhead_command
from .quality_command import quality_command
from .speed_commands import SPEED_COMMANDS

__all__ = ["bench"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="ddpm-bench")
def bench() -> None:
    """Measure engines: each number with the command that made it."""


bench.add_command(quality_command)
bench.add_command(likelihood_command)
bench.add_command(gallery_command)
bench.add_command(overhead_command)
for command in SPEED_COMMANDS:
    bench.add_command(command)
