"""How every command of this project starts and ends.

Exit codes: 0 done, 1 the work failed (the message says how to mend it), 2 the command was wrong,
130 interrupted. No command prints a traceback for an error it expects.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

import click

from .errors import ConfigurationError, DDPMError, missing_extra

__all__ = ["require_extra", "run_command"]


def require_extra(libraries: Sequence[str], purpose: str, extra: str) -> None:
    """Exit with code 1 and the exact pip line unless every library can be imported.

    Args:
        libraries: module names the command cannot start without.
        purpose: what the command does ("train a network").
        extra: the extra that brings them ("train").
    """
    for library in libraries:
        try:
            found = importlib.util.find_spec(library)
        except (ImportError, ValueError):
            found = None
        if found is None:
            click.echo(f"error: {missing_extra(library, purpose, extra)}", err=True)
            sys.exit(1)


def run_command(command: click.Command) -> int:
    """Run a click command; print expected errors in one line; return the exit code.

    Args:
        command: the command, given ``sys.argv``.
    """
    try:
        result = command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as misuse:
        misuse.show()
        return misuse.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted.", err=True)
        return 130
    except ConfigurationError as error:
        click.echo(f"error: {error}", err=True)
        return 2
    except (DDPMError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        return 1
    return result if isinstance(result, int) else 0
