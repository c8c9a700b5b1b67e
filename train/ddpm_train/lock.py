"""One process to a run directory."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ddpm_runtime.errors import ConfigurationError

__all__ = ["run_lock"]


@contextlib.contextmanager
def run_lock(run_directory: Path) -> Iterator[None]:
    """Hold the directory's lock; the kernel releases it when this process ends, however it ends.

    Raises:
        ConfigurationError: another process holds it (its process id is in the message), or the
            directory is not writable.
    """
    path = run_directory / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write in {str(run_directory)!r}: {error.strerror}. Choose another --out."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            raise ConfigurationError(
                f"{str(run_directory)!r} is in use by process {holder}. Wait for it, stop it "
                f"(kill {holder}), or choose another --out."
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
