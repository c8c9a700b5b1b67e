"""ddpm-bench compare: which cases of two reports differ by more than noise."""

from __future__ import annotations

from pathlib import Path

import click

from ddpm_runtime.errors import ConfigurationError

from .comparison import LEVEL, MARGIN, Verdict, compare_cases
from .report import print_rows
from .speed_report import read_report

__all__ = ["compare_command"]


@click.command("compare")
@click.argument("before", type=click.Path(path_type=Path))
@click.argument("after", type=click.Path(path_type=Path))
@click.option("--margin", default=MARGIN, help="A smaller change is not called one.")
@click.option("--level", default=LEVEL, help="Chance of a false alarm over all cases.")
@click.option("--fail-if-slower", is_flag=True, help="Exit 1 when a case became slower.")
@click.pass_context
def compare_command(
    context: click.Context, /, before: Path, after: Path, margin: float, level: float,
    fail_if_slower: bool,
) -> None:  # fmt: skip
    """Tell change from noise, case by case, between two reports of one command."""
    if not 0 <= margin < 1 or not 0 < level < 1:
        raise ConfigurationError(
            f"--margin must lie in [0, 1) and --level in (0, 1); got {margin} and {level}."
        )
    old, new = read_report(before), read_report(after)
    if old["report"] != new["report"]:
        raise ConfigurationError(
            f"{before.name} is of {old['report']!r} and {after.name} of {new['report']!r}; "
            "compare two reports of one command."
        )
    verdicts = compare_cases(old, new, margin=margin, level=level)
    if not verdicts:
        raise ConfigurationError(
            f"{before.name} and {after.name} share no timed case; measure the same engine, "
            "backend and batch sizes twice."
        )
    for note in _differences(old, new):
        click.echo(f"note: {note}")
    _print(verdicts)
    slower = [verdict for verdict in verdicts if verdict.outcome == "slower"]
    faster = [verdict for verdict in verdicts if verdict.outcome == "faster"]
    if slower or faster:
        click.echo(f"\nchange: {len(slower)} slower, {len(faster)} faster, of {len(verdicts)}")
    else:
        click.echo(f"\nno change in {len(verdicts)} cases")
    if slower and fail_if_slower:
        context.exit(1)


def _print(verdicts: list[Verdict]) -> None:
    rows = [("case", "after/before", "interval", "control", "verdict")]
    for one in verdicts:
        low, high = one.interval
        control = "-" if one.control_ratio is None else f"{one.control_ratio:.3f}"
        rows.append(
            (one.case_id, f"{one.ratio:.3f}", f"{low:.3f} to {high:.3f}", control, one.outcome)
        )
    print_rows(rows)


def _differences(old: dict[str, object], new: dict[str, object]) -> list[str]:
    """What else differs between the two, which a speed comparison should know."""
    before, after = old["environment"], new["environment"]
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    return [
        f"{key} differs: {before.get(key)} before, {after.get(key)} after"
        for key in ("processor", "libraries", "python", "threads")
        if before.get(key) != after.get(key)
    ]
