"""A folder of this user's for what is slow to make twice: compiled networks, calibrations.

    <cache>/ddpm-engine/NAME-KEY      32 bytes of SHA-256, then the content

``<cache>`` is $DDPM_ENGINE_CACHE, else $XDG_CACHE_HOME, else ~/.cache. An inference library trusts
what it is given here, so the folder must be the user's own and closed to others (0700); anything
else is not used, and neither is a file that is not what was written. A cache that cannot be used
costs time, never a result: nothing here raises.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

from ..atomic import atomic_file

__all__ = ["UserCache"]

_log = logging.getLogger("ddpm_runtime")
_DIGEST_BYTES = 32
_MAX_FILE_BYTES = 8 << 30
_MAX_FOLDER_BYTES = 4 << 30


class UserCache:
    """Named content by key.

    Args:
        folder: where; None asks the environment. An empty $DDPM_ENGINE_CACHE turns the cache off.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = _usable(folder or _default_folder())

    @property
    def folder(self) -> Path | None:
        """Where the content is; None when there is no folder that may be trusted."""
        return self._folder

    def load(self, name: str, *key: object) -> bytes | None:
        """What was stored under this name and key, or None."""
        path = self._path(name, key)
        if path is None:
            return None
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(path, flags)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not _is_ours(status) or not stat.S_ISREG(status.st_mode):
                return None
            if status.st_size > _MAX_FILE_BYTES:
                return None
            digest, content = file.read(_DIGEST_BYTES), file.read()
        if hashlib.sha256(content).digest() != digest:
            _log.warning("a damaged cache file is ignored: %s", path.name)
            return None
        return content

    def store(self, name: str, *key: object, content: bytes) -> None:
        """Keep content for the next process; a full or read-only disk is not an error."""
        path = self._path(name, key)
        if path is None:
            return
        try:
            with atomic_file(path) as file:
                file.write(hashlib.sha256(content).digest())
                file.write(content)
            _forget_oldest(path.parent)
        except OSError as error:
            _log.warning("nothing is cached: %s", error.strerror)

    def _path(self, name: str, key: tuple[object, ...]) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        return self._folder / f"{name}-{digest}"


def _forget_oldest(folder: Path) -> None:
    """Remove what was written longest ago, while the folder is over its limit."""
    files = [(entry.stat(), entry) for entry in folder.iterdir() if entry.is_file()]
    total_bytes = sum(status.st_size for status, _ in files)
    for status, entry in sorted(files, key=lambda file: file[0].st_mtime):
        if total_bytes <= _MAX_FOLDER_BYTES:
            return
        entry.unlink(missing_ok=True)
        total_bytes -= status.st_size


def _default_folder() -> Path | None:
    asked = os.environ.get("DDPM_ENGINE_CACHE")
    if asked is not None:
        return Path(asked) if asked else None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "ddpm-engine"
    except RuntimeError:  # no home
        return None


def _usable(folder: Path | None) -> Path | None:
    """Make the folder if it is not there; None when it may not be trusted."""
    if folder is None or not folder.is_absolute():
        return None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        _log.warning("nothing is cached: %s", error.strerror)
        return None
    if not stat.S_ISDIR(status.st_mode) or not _is_ours(status) or status.st_mode & 0o077:
        _log.warning("the cache folder is not used: it must be yours alone (chmod 700).")
        return None
    return folder


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()
