"""Plans this user has built, by what they were built for: never stale, never from a stranger.

    ~/.cache/ddpm-engine/plans/        0700, this user's; DDPM_PLAN_CACHE names another
        3f2a….plan                     a sealed plan; its name is the hash of its key
        3f2a….timing, ….kernels        what a builder measured, what a runtime compiled
        3f2a….lock                     held by the process that is building; holds its id

A plan is found by its whole key, so it can be missing but not wrong. When one is missing, the entry
most like it says why. An entry that is damaged, or that this user's secret did not seal, is built
again. Two processes that want the same plan: one builds, the other waits and then reads it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError, DamagedPlanError, PlanError, UntrustedPlanError
from .sealed import Sealed, Secret, read_header, read_sealed, user_secret, write_sealed
from .spec import PlanKey

__all__ = ["CachedPlan", "PlanCache", "default_cache_directory"]

Notice = Callable[[str], None]

_KINDS = ("plan", "timing", "kernels")
_POLL_S = 0.1


def default_cache_directory() -> Path:
    """``$DDPM_PLAN_CACHE``, else ``ddpm-engine/plans`` under ``$XDG_CACHE_HOME`` or ~/.cache."""
    chosen = os.environ.get("DDPM_PLAN_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    # the XDG specification says to ignore a relative one
    root = Path(base) if base and os.path.isabs(base) else Path.home() / ".cache"
    return root / "ddpm-engine" / "plans"


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedPlan:
    """A plan, ready to be loaded.

    Args:
        payload: the plan's bytes.
        built: whether it was built just now.
        reason: where it came from, or why it was built.
    """

    payload: bytes
    built: bool
    reason: str


class PlanCache:
    """A directory of sealed plans.

    Args:
        directory: None means :func:`default_cache_directory`; made if it is missing.

    Raises:
        ConfigurationError: the directory belongs to somebody else, or others may write in it.
        OSError: it cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self.directory = default_cache_directory() if directory is None else Path(directory)
        self.directory.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self.directory.mkdir(mode=0o700)
        status = os.lstat(self.directory)
        mine = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
        if not mine or status.st_mode & 0o077:
            raise ConfigurationError(
                f"{str(self.directory)!r} is not a directory of this user alone (mode "
                f"{stat.S_IMODE(status.st_mode):o}, owner {status.st_uid}). Plans are native code: "
                "look at what is in it, then chmod 700 it, or name another with DDPM_PLAN_CACHE."
            )
        self.secret: Secret = user_secret(self.directory)

    def get_or_build(
        self,
        key: PlanKey,
        build: Callable[[], bytes],
        *,
        label: str,
        notice: Notice = lambda _message: None,
        timeout_s: float | None = None,
    ) -> CachedPlan:
        """The plan for a key, built if it is not there.

        Args:
            key: what it is for.
            build: makes the plan; called at most once, by one process at a time.
            label: the network's name, for people.
            notice: told why a plan is built, and whom we wait for.
            timeout_s: how long to wait for another builder; None means as long as it lives.

        Raises:
            PlanError: the other builder took too long; whatever ``build`` raises.
        """
        found = self._read(key, "plan")
        if isinstance(found, bytes):
            return CachedPlan(payload=found, built=False, reason="found in the plan cache")
        with self._lock(key, notice, timeout_s):
            found = self._read(key, "plan")
            if isinstance(found, bytes):
                return CachedPlan(payload=found, built=False, reason="another process built it")
            reason = found or self._nearest(key, label)
            notice(f"building a plan for {label}: {reason}")
            payload = build()
            self.put(key, "plan", payload, label=label, notice=notice)
        return CachedPlan(payload=payload, built=True, reason=reason)

    def get(self, key: PlanKey, kind: str) -> bytes | None:
        """What was kept for a key, if it is there, whole and ours.

        Args:
            key: what it is for.
            kind: "plan", "timing" or "kernels".
        """
        found = self._read(key, kind)
        return found if isinstance(found, bytes) else None

    def put(
        self,
        key: PlanKey,
        kind: str,
        payload: bytes,
        *,
        label: str,
        notice: Notice = lambda _message: None,
    ) -> None:
        """Keep something for a key. A full disk is told to ``notice``, not raised."""
        path = self._path(key, kind)
        try:
            write_sealed(path, payload, kind=kind, label=label, key=key, secret=self.secret)
        except OSError as error:
            notice(
                f"the {kind} is not kept, and will be made again next time: {error.strerror} "
                f"({str(self.directory)!r}). Free some space, or name another directory with "
                "DDPM_PLAN_CACHE."
            )

    def entries(self) -> list[Sealed]:
        """Headers of all plans that are ours, the latest written first."""
        found = []
        for path in self.directory.glob("*.plan"):
            with contextlib.suppress(DamagedPlanError, OSError):
                header = read_header(path, self.secret)
                if header.ours:
                    found.append((path.stat().st_mtime, header))
        return [header for _, header in sorted(found, key=lambda pair: -pair[0])]

    def prune(self, keep_bytes: int) -> list[Path]:
        """Remove what was used longest ago until the rest fits; return what was removed.

        A plan that a process is building is not touched, nor the secret.
        """
        files = sorted(
            (path for kind in _KINDS for path in self.directory.glob(f"*.{kind}")),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        removed, total = [], 0
        for path in files:
            total += path.stat().st_size
            if total > keep_bytes:
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def _read(self, key: PlanKey, kind: str) -> bytes | str | None:
        """What was kept for a key; in words, why it cannot be used; None when there is nothing."""
        path = self._path(key, kind)

        def check(header: Sealed) -> None:
            header.require_ours()
            if header.key != key or header.kind != kind:
                raise DamagedPlanError(f"{str(path)!r} was made for something else.")

        try:
            _, payload = read_sealed(path, self.secret, check)
        except FileNotFoundError:
            return None
        except (DamagedPlanError, UntrustedPlanError) as error:
            return f"the one in the cache cannot be used: {error}"
        with contextlib.suppress(OSError):
            os.utime(path)  # for prune
        return payload

    def _nearest(self, key: PlanKey, label: str) -> str:
        """Why a plan is missing: how its key differs from the entry most like it."""
        alike = [
            (entry.key.network_sha256 != key.network_sha256, key.differences(entry.key))
            for entry in self.entries()
            if entry.label == label or entry.key.network_sha256 == key.network_sha256
        ]
        if not alike:
            return "there is none for this network yet"
        _, differences = min(alike, key=lambda pair: (pair[0], len(pair[1])))
        return f"something changed since the last one was built ({'; '.join(differences)})"

    def _path(self, key: PlanKey, kind: str) -> Path:
        return self.directory / f"{key.identity}.{kind}"

    @contextlib.contextmanager
    def _lock(self, key: PlanKey, notice: Notice, timeout_s: float | None) -> Iterator[None]:
        """Be the only builder of a key; the kernel releases the lock when a process dies."""
        path = self.directory / f"{key.identity}.lock"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            self._acquire(descriptor, notice, timeout_s)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _acquire(self, descriptor: int, notice: Notice, timeout_s: float | None) -> None:
        begun, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            if not told:
                notice(f"waiting for process {holder}, which is building this plan")
                told = True
            if timeout_s is not None and time.monotonic() - begun > timeout_s:
                raise PlanError(
                    f"process {holder} has been building this plan for more than {timeout_s:g} s. "
                    f"Wait for it, or stop it (kill {holder}) and try again."
                )
            time.sleep(_POLL_S)
