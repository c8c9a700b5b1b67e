"""Where an export goes, what the engine is called, and what it must never replace.

    model.pt ─▶ model.engine        model.pt in fp16 ─▶ model.fp16.engine

Must not import torch or onnx: these questions are answered before either is loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

from ddpm_runtime.bundle import read_bundle
from ddpm_runtime.errors import BundleError, ConfigurationError, IntegrityError

__all__ = ["PRECISIONS", "check_destination", "default_output", "engine_name", "looks_like_engine"]

PRECISIONS = ("fp32", "fp16", "bf16")
"""What an engine can be exported in; the first is what networks are trained in."""

_PLAIN_NAMES = ("model", "checkpoint", "ema", "last", "best")  # the directory says more


def default_output(source: Path, form: str = "fp32") -> Path:
    """``model.pt`` → ``model.engine`` beside it; ``a-folder`` → ``a-folder.engine``.

    In another form than float32: ``model.fp16.engine``, ``a.cached.engine`` for an ``a.engine``.
    """
    plain = source.resolve() if source.name in ("", ".", "..") else source
    stem = plain.stem if plain.is_file() else plain.name.removesuffix(".engine")
    suffix = "" if form == "fp32" else f".{form}"
    return plain.with_name(f"{stem}{suffix}.engine")


def engine_name(destination: Path, precision: str = "fp32") -> str:
    """The bundle's name without ``.engine``; its directory's if that is a mere "model"."""
    stem = destination.name.removesuffix(".engine").removesuffix(f".{precision}")
    parent = destination.resolve().parent.name
    return parent if stem in _PLAIN_NAMES and parent else stem


def looks_like_engine(path: Path) -> bool:
    """Whether a path is a directory with a manifest, so that reading it gives the right error."""
    return (path / "manifest.json").is_file()


def check_destination(destination: Path, *, force: bool) -> None:
    """Refuse early what cannot, or must not, be written: only an engine is ever replaced.

    Raises:
        ConfigurationError: something is there, and ``force`` is off or it is not an engine.
        OSError: its directory is missing or not writable.
    """
    parent = destination.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "is not writable" if parent.is_dir() else "is not a directory"
        raise OSError(f"cannot write {str(destination)!r}: {str(parent)!r} {reason}.")
    if not os.path.lexists(destination):
        return
    if not force:
        raise ConfigurationError(
            f"{str(destination)!r} exists; give --force to replace it, or another --output."
        )
    if not _is_engine(destination):
        raise ConfigurationError(
            f"{str(destination)!r} exists and is not an engine, so --force does not replace it. "
            "Remove it yourself, or give another --output."
        )


def _is_engine(path: Path) -> bool:
    """Whether a path is a directory with our manifest, whole or damaged: safe to replace."""
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        read_bundle(path)
    except IntegrityError:
        return True
    except BundleError:
        return False
    return True
