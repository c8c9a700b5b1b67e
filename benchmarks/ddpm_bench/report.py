"""What a number needs beside it: the command, the versions, the machine, the commit.

Reports name files, never the folders they lie in: they are made to be published.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from ddpm_runtime import __version__
from ddpm_runtime.atomic import atomic_file
from ddpm_runtime.errors import ConfigurationError

__all__ = [
    "check_folder",
    "check_json",
    "command_line",
    "environment",
    "print_machine",
    "print_rows",
    "write_json",
]

_LIBRARIES = ("numpy", "onnxruntime", "torch")

# Instruction sets that decide how fast a network runs on a CPU.
_CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def command_line(context: click.Context) -> str:
    """The command that was typed, with every option that is not a default, paths by name.

    Args:
        context: of the sub-command.
    """
    words = ["ddpm-bench", str(context.info_name)]
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if value in (None, ()) or value == parameter.get_default(context):
            continue
        flag = max(parameter.opts, key=len)
        if isinstance(value, bool):
            words.append(flag if value else parameter.secondary_opts[0])
            continue
        for one in value if isinstance(value, tuple) else (value,):
            words += [flag, one.name if isinstance(one, Path) else str(one)]
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """Versions, processor and commit, as plain JSON values; no user, host or path."""
    return {
        "ddpm_engine": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES if _version(name)},
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
    }


def print_rows(rows: Iterable[tuple[str, ...]]) -> None:
    """Print rows in aligned columns on stdout: the first to the left, the others to the right."""
    table = [tuple(str(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells).rstrip())


def print_machine(report: dict[str, Any]) -> None:
    """Print what a report was made with, on stdout."""
    machine = report["environment"]
    processor = machine["processor"]
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    click.echo(f"command {report['command']}")
    click.echo(
        f"ddpm-engine {machine['ddpm_engine']} at {machine['commit'] or 'no commit'}, "
        f"Python {machine['python']}, {libraries}"
    )
    click.echo(
        f"{processor['model']}, {processor['usable']} usable processors, "
        f"{' '.join(processor['instruction_sets'])}"
    )


def check_json(path: Path | None) -> None:
    """Refuse a report that could not be written, before any work is done; None is no report.

    Raises:
        ConfigurationError: not a .json name.
        OSError: its folder is missing, or may not be written to.
    """
    if path is None:
        return
    if path.suffix != ".json":
        raise ConfigurationError(
            f"reports are JSON; give a name that ends in .json, not {path.name!r}."
        )
    check_folder(path)


def check_folder(path: Path) -> None:
    """Refuse a file whose folder is missing or may not be written to.

    Raises:
        OSError: which of the two.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: no folder {path.parent}; make it first."
        )
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {path.parent} is read-only for you.")


def write_json(path: str | os.PathLike[str], report: dict[str, Any]) -> None:
    """Write a report atomically, as strict JSON.

    Raises:
        ValueError: the report holds NaN or infinity, which JSON has no word for.
        OSError: the destination cannot be written.
    """
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_file(path) as file:
        file.write(text.encode())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this file's repository, "+" when files differ from it; None outside one."""
    git = shutil.which("git")
    here = Path(__file__).parent
    if git is None:
        return None
    words = [[git, "rev-parse", "HEAD"], [git, "status", "--porcelain", "--untracked-files=no"]]
    try:
        commit, changes = (
            subprocess.run(  # noqa: S603  # fixed words, an absolute program
                word, cwd=here, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
            for word in words
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")


def _processor() -> dict[str, Any]:
    """Model, processors this process may use, and the instruction sets that matter."""
    usable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    flags = found.get("flags", "").split()
    return {
        "model": found.get("model name") or platform.processor() or "unknown",
        "usable": len(usable),
        "instruction_sets": [flag for flag in _CPU_FLAGS if flag in flags],
    }
