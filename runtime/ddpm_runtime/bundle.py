"""The engine bundle: a directory ``NAME.engine/`` with a manifest and an ONNX network.

    manifest.json    everything below, strict JSON, at most 1 MiB
    network.onnx     (sample, timestep[, label]) -> prediction
    whole.onnx       (sample, timestep[, label]) -> prediction, deep       only for step caching
    shallow.onnx     (sample, timestep[, label], deep) -> prediction       likewise

    sample      float32 (N, C, H, W)      x_t, already multiplied by the row's input_scale
    timestep    float32 (N,)              what the program's row says
    label       int64   (N,)              only for class-conditional networks; num_classes = none
    prediction  float32 (N, C or 2·C, H, W)
    deep        float32 (N, ...)              features that step caching keeps; see evaluation.py

Precision is inside the graph. The file table of the manifest gives size and SHA-256 of every other
file; bytes are read once, hashed, and those same bytes are handed to the inference library. A hash
proves that the file is the one the manifest means, not who wrote either. Nothing is ever unpickled,
and no TensorRT plan is ever loaded from here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from .atomic import atomic_directory
from .errors import ConfigurationError, IntegrityError, ManifestError, NotABundleError
from .schedule import NoiseSchedule, make_schedule
from .trajectory import PREDICTION_TYPES

__all__ = [
    "FORMAT_VERSION",
    "Bundle",
    "CachedNetwork",
    "Defaults",
    "FileEntry",
    "Image",
    "Manifest",
    "Network",
    "StepCache",
    "read_bundle",
    "write_bundle",
]

FORMAT_VERSION = 1
NETWORK_FILE = "network.onnx"
WHOLE_FILE = "whole.onnx"
SHALLOW_FILE = "shallow.onnx"

_MANIFEST_FILE = "manifest.json"
_MAX_MANIFEST_BYTES = 1 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fields are exact: an unknown one is refused, a wrong type is refused."""


class Image(_Strict, frozen=True, kw_only=True):
    """Height and width in pixels, channels, and the range the network works in."""

    height: int
    width: int
    channels: int
    value_range: tuple[float, float] = (-1.0, 1.0)


class StepCache(_Strict, frozen=True, kw_only=True):
    """The network in two parts: shape of the deep features, skip connections outside of them."""

    deep: tuple[int, int, int]
    skips: int


class Network(_Strict, frozen=True, kw_only=True):
    """What the network predicts, and in which numbers."""

    prediction_type: str
    precision: str = "fp32"
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    learned_variance: bool = False
    opset: int
    step_cache: StepCache | msgspec.UnsetType = msgspec.UNSET


class Defaults(_Strict, frozen=True, kw_only=True):
    """What ``Engine.sample`` does when it is not told."""

    sampler: str = "ddim"
    steps: int = 50
    spacing: str = "leading"
    guidance_scale: float = 1.0
    clip_denoised: bool = True


class FileEntry(_Strict, frozen=True, kw_only=True):
    """One file of the bundle."""

    size_bytes: int
    sha256: str


class Manifest(_Strict, frozen=True, kw_only=True):
    """The whole of ``manifest.json``.

    ``schedule`` holds the arguments of :func:`~ddpm_runtime.schedule.make_schedule`; ``parity`` the
    report of the export gate; ``provenance`` free text values (versions, recipe, training step).
    """

    format: str = "ddpm-engine"
    format_version: int = FORMAT_VERSION
    name: str
    image: Image
    network: Network
    schedule: dict[str, Any]
    defaults: Defaults
    parity: dict[str, Any] = {}
    provenance: dict[str, str] = {}
    files: dict[str, FileEntry] = {}


class _Header(msgspec.Struct):
    """Read before anything else, so that a newer format is named rather than mis-parsed."""

    format: str
    format_version: int


@dataclass(frozen=True, kw_only=True)
class CachedNetwork:
    """The network for step caching: the whole of it, and its outer layers."""

    whole_bytes: bytes
    shallow_bytes: bytes


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle in memory: the manifest, and the bytes that were hashed."""

    manifest: Manifest
    network_bytes: bytes
    schedule: NoiseSchedule
    cached: CachedNetwork | None = None

    @property
    def prediction_channels(self) -> int:
        """Channels the network answers with."""
        image, network = self.manifest.image, self.manifest.network
        return image.channels * (2 if network.learned_variance else 1)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Read and check a bundle. No inference library sees a byte of it before this returns.

    Raises:
        NotABundleError: no directory with a manifest there.
        ManifestError: the manifest is malformed, contradictory, or of a newer format.
        IntegrityError: a file is missing, truncated, or not the one that was hashed.
    """
    directory = Path(path)
    manifest_path = directory / _MANIFEST_FILE
    if not manifest_path.is_file():
        raise NotABundleError(
            f"{directory} is not an engine bundle: no {_MANIFEST_FILE} in it. "
            "Give the directory that ddpm-export wrote (NAME.engine)."
        )
    raw = _read_regular_file(manifest_path, limit_bytes=_MAX_MANIFEST_BYTES)
    manifest = parse_manifest(raw)
    schedule = _checked(manifest)
    network_bytes = _read_checked(directory, NETWORK_FILE, manifest.files)
    cached = None
    if manifest.network.step_cache is not msgspec.UNSET:
        cached = CachedNetwork(
            whole_bytes=_read_checked(directory, WHOLE_FILE, manifest.files),
            shallow_bytes=_read_checked(directory, SHALLOW_FILE, manifest.files),
        )
    return Bundle(manifest=manifest, network_bytes=network_bytes, schedule=schedule, cached=cached)


def write_bundle(
    path: str | os.PathLike[str],
    manifest: Manifest,
    network_bytes: bytes,
    cached: CachedNetwork | None = None,
) -> Manifest:
    """Write a bundle in one step: the old directory or the new one, never half of one.

    Args:
        path: destination, usually ``NAME.engine``.
        manifest: its ``files`` are filled in here.
        network_bytes: the ONNX file.
        cached: the network for step caching, when the manifest describes it.

    Returns:
        The manifest as written.

    Raises:
        ManifestError: the manifest contradicts itself.
        OSError: the destination cannot be written.
    """
    contents = {NETWORK_FILE: network_bytes}
    if cached is not None:
        contents |= {WHOLE_FILE: cached.whole_bytes, SHALLOW_FILE: cached.shallow_bytes}
    entries = {
        name: FileEntry(size_bytes=len(content), sha256=_sha256(content))
        for name, content in contents.items()
    }
    manifest = msgspec.structs.replace(manifest, files=entries)
    _checked(manifest)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
    parse_manifest(text)
    with atomic_directory(path) as directory:
        for name, content in contents.items():
            (directory / name).write_bytes(content)
        (directory / _MANIFEST_FILE).write_bytes(text + b"\n")
    return manifest


def parse_manifest(raw: bytes) -> Manifest:
    """Decode a manifest strictly.

    Raises:
        ManifestError: not JSON, duplicate keys, unknown or missing fields, a newer format.
    """
    try:
        json.loads(raw, object_pairs_hook=_refuse_duplicates, parse_constant=_refuse_constant)
        header = msgspec.json.decode(raw, type=_Header)
        if header.format != "ddpm-engine":
            raise ManifestError(
                f"the manifest is of format {header.format!r}, not 'ddpm-engine'; "
                "give a bundle that ddpm-export wrote."
            )
        if header.format_version > FORMAT_VERSION:
            raise ManifestError(
                f"the manifest has format version {header.format_version}; this ddpm_runtime reads "
                f"up to {FORMAT_VERSION}. Upgrade with: pip install -U ddpm-engine"
            )
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ManifestError(
            f"the manifest cannot be read: {error}. Export the checkpoint again with ddpm-export."
        ) from error


def _checked(manifest: Manifest) -> NoiseSchedule:
    """Refuse manifests whose fields are well-typed but impossible; make the schedule."""
    image, network = manifest.image, manifest.network
    limits = {
        "image.height": (image.height, 1, 1 << 14),
        "image.width": (image.width, 1, 1 << 14),
        "image.channels": (image.channels, 1, 1 << 10),
        "network.num_classes": (network.num_classes, 0, 1 << 20),
        "schedule.num_train_timesteps": (manifest.schedule.get("num_train_timesteps"), 1, 1 << 20),
        "defaults.steps": (manifest.defaults.steps, 1, 1 << 20),
    }
    for field, (value, low, high) in limits.items():
        if type(value) is not int or not low <= value <= high:
            raise ManifestError(f"manifest field {field} is {value!r}; possible: {low} to {high}.")
    if image.value_range != (-1.0, 1.0):
        raise ManifestError(
            f"manifest field image.value_range is {image.value_range}; only (-1, 1)."
        )
    if network.prediction_type not in PREDICTION_TYPES:
        raise ManifestError(
            f"manifest field network.prediction_type is {network.prediction_type!r}; "
            f"possible: {', '.join(PREDICTION_TYPES)}."
        )
    if network.class_names and len(network.class_names) != network.num_classes:
        raise ManifestError(
            f"the manifest names {len(network.class_names)} classes but network.num_classes "
            f"is {network.num_classes}."
        )
    for name in manifest.files:
        if not _FILE_NAME.fullmatch(name):
            raise ManifestError(f"manifest file name {name!r} is not a plain file name.")
    needed = [NETWORK_FILE]
    if isinstance(network.step_cache, StepCache):
        needed += [WHOLE_FILE, SHALLOW_FILE]
        if min(*network.step_cache.deep, network.step_cache.skips) < 1:
            raise ManifestError(
                f"manifest field network.step_cache is {network.step_cache}; its numbers are ≥ 1."
            )
    for name in needed:
        if name not in manifest.files:
            raise ManifestError(f"the manifest lists no {name}; export the checkpoint again.")
    try:
        return make_schedule(**manifest.schedule)
    except (ConfigurationError, TypeError, ValueError, OverflowError) as error:
        raise ManifestError(f"manifest field schedule is impossible: {error}") from error


def _read_checked(directory: Path, name: str, files: Mapping[str, FileEntry]) -> bytes:
    entry = files[name]
    path = directory / name
    if not path.exists():
        raise IntegrityError(f"{path} is missing; copy the whole bundle, or export it again.")
    content = _read_regular_file(path, limit_bytes=entry.size_bytes)
    if len(content) != entry.size_bytes:
        raise IntegrityError(
            f"{path} is truncated: {len(content)} bytes, the manifest says {entry.size_bytes}. "
            "Copy the bundle again, or export it again."
        )
    if _sha256(content) != entry.sha256:
        raise IntegrityError(
            f"{path} is not the file that was exported: SHA-256 {_sha256(content)[:16]}…, the "
            f"manifest says {entry.sha256[:16]}…. Copy the bundle again, or export it again."
        )
    return content


def _read_regular_file(path: Path, *, limit_bytes: int) -> bytes:
    """Read a regular file without following a final symbolic link; refuse one over the limit."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}.") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise IntegrityError(f"{path} is not a regular file.")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit_bytes:
            raise IntegrityError(
                f"{path} has {status.st_size} bytes, more than the {limit_bytes} allowed; "
                "export the bundle again."
            )
        return file.read(limit_bytes + 1)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"duplicate key {key!r}")
    return dict(pairs)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
