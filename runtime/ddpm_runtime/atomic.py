"""Files and directories that are either the old one or the new one, never half of one.

Everything is written under a temporary name beside its destination, flushed to the disk, then
renamed over it; then the directory that holds it is flushed. A process killed at any moment leaves
the old artefact or the new one, and at worst a temporary, which the next write to the same
destination sweeps away once its writer is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_directory", "atomic_file"]

_serial = itertools.count()
_ours: set[str] = set()  # temporaries this process is writing right now


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that appears at ``path``, whole and on the disk, when the block ends.

    On any exception the destination is untouched and nothing is left behind.

    Raises:
        OSError: the directory is missing, full or not writable.
    """
    with _temporary_beside(Path(path)) as temporary:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a flat directory that appears at ``path``, whole and on the disk, when the block ends.

    A directory already there is exchanged with the new one in a single step, then removed.

    Raises:
        OSError: the parent is missing, full or not writable; or the destination exists and this
            system cannot exchange two directories (only Linux can).
    """
    with _temporary_beside(Path(path)) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if os.path.lexists(path):
            _exchange(temporary, Path(path))
        else:
            os.rename(temporary, path)


@contextlib.contextmanager
def _temporary_beside(destination: Path) -> Iterator[Path]:
    """A fresh name beside the destination; whatever it names at the end is removed."""
    _sweep(destination)
    name = f".{destination.name}.{os.getpid()}-{next(_serial)}.tmp"
    temporary = destination.with_name(name)
    _ours.add(name)
    try:
        yield temporary
        _flush(destination.parent)
    finally:
        _remove(temporary)
        _ours.discard(name)


def _sweep(destination: Path) -> None:
    """Remove temporaries that dead writers left for this destination."""
    if not destination.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{destination.name}.") + r"(\d+)-\d+\.tmp")
    for entry in os.scandir(destination.parent):
        match = pattern.fullmatch(entry.name)
        if match and entry.name not in _ours and not _another_process(int(match[1])):
            _remove(Path(entry.path))


def _another_process(process_id: int) -> bool:
    """Whether a living process other than this one has the id."""
    if process_id == os.getpid():
        return False
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> None:
    """Swap two names in one step: renameat2(2) with RENAME_EXCHANGE."""
    at_working_directory, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(f"{other} exists and this system cannot replace it in one step; remove it.")
    done = renameat2(
        at_working_directory,
        os.fsencode(one),
        at_working_directory,
        os.fsencode(other),
        rename_exchange,
    )
    if done != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(other))
