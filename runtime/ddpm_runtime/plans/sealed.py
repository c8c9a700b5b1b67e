"""A plan on disk: who may read it back, and how we know that it is the one we wrote.

    ddpm-engine plan 1        and a line feed: 19 bytes
    header length             8 bytes, little endian
    header                    JSON: kind, label, key, payload_bytes, payload_sha256
    seal                      32 bytes, HMAC-SHA256 of everything above under this user's secret
    payload                   the plan

A plan is native code: whoever wrote it runs as you once it is loaded. The hash says that the bytes
are whole; only the seal says that this user's own builder wrote them. The secret is 32 random bytes
beside the cache, readable by its owner alone. Whoever can write there can already run code as that
user; what the seal stops is a plan that was carried there, in an archive or by a helpful colleague.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from ..atomic import atomic_file
from ..errors import ConfigurationError, DamagedPlanError, UntrustedPlanError
from .spec import PlanKey

__all__ = ["Sealed", "Secret", "read_header", "read_sealed", "user_secret", "write_sealed"]

_MAGIC = b"ddpm-engine plan 1\n"
_MAX_HEADER_BYTES = 1 << 16
_SEAL_BYTES = 32

Secret = bytes


class _Header(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    label: str
    key: dict[str, str]
    payload_bytes: int
    payload_sha256: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Sealed:
    """A plan file's header, checked as far as its own words go.

    Args:
        path: the file.
        kind: "plan", "timing" (a builder's measurements) or "kernels" (what a runtime compiled).
        label: the network's name, for people.
        key: what it was made for.
        payload_bytes: size of what follows the header.
        payload_sha256: its hash.
        ours: whether the seal was made with this user's secret.
        offset: where the payload begins.
    """

    path: Path
    kind: str
    label: str
    key: PlanKey
    payload_bytes: int
    payload_sha256: str
    ours: bool
    offset: int

    def require_ours(self, *, trust_plan: bool = False) -> None:
        """Refuse a plan from somebody else.

        Raises:
            UntrustedPlanError: it is not ours, and ``trust_plan`` is off.
        """
        if not (self.ours or trust_plan):
            raise UntrustedPlanError(
                f"{str(self.path)!r} was not built by this user on this machine. A plan is native "
                "code that runs as you. Build one here from the bundle's ONNX network (leave the "
                "plan out), or pass --trust-plan if you trust whoever made it."
            )


def write_sealed(
    path: Path, payload: bytes, *, kind: str, label: str, key: PlanKey, secret: Secret
) -> None:
    """Write a plan file in one step, readable by its owner alone.

    Raises:
        OSError: the directory is full or not writable.
    """
    header = msgspec.json.encode(
        _Header(
            kind=kind,
            label=label,
            key=asdict(key),
            payload_bytes=len(payload),
            payload_sha256=hashlib.sha256(payload).hexdigest(),
        )
    )
    head = _MAGIC + len(header).to_bytes(8, "little") + header
    with atomic_file(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(head)
        file.write(_seal(secret, head))
        file.write(payload)


def read_header(path: Path, secret: Secret) -> Sealed:
    """Read a plan file's header; not a byte of the plan.

    Raises:
        DamagedPlanError: no plan file, or one cut short in its header.
        FileNotFoundError: there is no such file.
    """
    with _open_regular(path) as file:
        return _header(file, path, secret)


def read_sealed(
    path: Path, secret: Secret, check: Callable[[Sealed], None]
) -> tuple[Sealed, bytes]:
    """Read a plan once ``check`` has let its header pass: the very bytes that were hashed.

    Args:
        path: the file; opened once, so what is checked is what is read.
        secret: this user's.
        check: raises to refuse the plan before any of it is read.

    Raises:
        DamagedPlanError: truncated, too long, or not the bytes that were written.
        FileNotFoundError: there is no such file.
    """
    with _open_regular(path) as file:
        header = _header(file, path, secret)
        check(header)
        size = os.fstat(file.fileno()).st_size - header.offset
        if size != header.payload_bytes:
            raise DamagedPlanError(
                f"{str(path)!r} holds {size} bytes of plan where its header says "
                f"{header.payload_bytes}. Build the plan again."
            )
        payload = file.read(size)
    found = hashlib.sha256(payload).hexdigest()
    if found != header.payload_sha256:
        raise DamagedPlanError(
            f"{str(path)!r} was altered: SHA-256 {found[:16]}…, its header says "
            f"{header.payload_sha256[:16]}…. Build the plan again."
        )
    return header, payload


def user_secret(directory: Path) -> Secret:
    """This user's secret, made the first time it is asked for.

    Raises:
        ConfigurationError: the file is not this user's alone.
        OSError: it can be neither read nor made.
    """
    path = directory / "seal.secret"
    if not os.path.lexists(path):
        _make_secret(path)
    with _open_regular(path) as file:
        status = os.fstat(file.fileno())
        secret = file.read(64)
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or len(secret) != 32:
        raise ConfigurationError(
            f"{str(path)!r} is not this user's alone, so no plan in {str(directory)!r} can be "
            "trusted. Remove the directory; plans are built again."
        )
    return secret


def _make_secret(path: Path) -> None:
    """Write 32 random bytes, whole or not at all; of two processes the first wins."""
    fresh = path.with_name(f".seal.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


def _header(file: BinaryIO, path: Path, secret: Secret) -> Sealed:
    head = file.read(len(_MAGIC) + 8)
    size = int.from_bytes(head[len(_MAGIC) :], "little")
    if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + 8 or size > _MAX_HEADER_BYTES:
        raise DamagedPlanError(
            f"{str(path)!r} is not a plan file that ddpm-engine wrote: a bare TensorRT plan does "
            "not say what it was built for. Build one with ddpm-export --tensorrt."
        )
    raw, seal = file.read(size), file.read(_SEAL_BYTES)
    try:
        header = msgspec.json.decode(raw, type=_Header)
        key = PlanKey(**header.key)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise DamagedPlanError(
            f"the header of {str(path)!r} cannot be read: {error}. Build the plan again."
        ) from error
    return Sealed(
        path=path,
        kind=header.kind,
        label=header.label,
        key=key,
        payload_bytes=header.payload_bytes,
        payload_sha256=header.payload_sha256,
        ours=hmac.compare_digest(seal, _seal(secret, head + raw)),
        offset=len(head) + size + _SEAL_BYTES,
    )


def _seal(secret: Secret, head: bytes) -> bytes:
    return hmac.new(secret, head, hashlib.sha256).digest()


def _open_regular(path: Path) -> BinaryIO:
    """Open a regular file, never through a symbolic link.

    Raises:
        DamagedPlanError: it is a link, a directory, a device, ….
        FileNotFoundError: there is no such file.
    """
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb")
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise DamagedPlanError(f"{str(path)!r} is not a regular file.") from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DamagedPlanError(f"{str(path)!r} is not a regular file.")
    return file
