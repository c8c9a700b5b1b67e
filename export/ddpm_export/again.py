"""An engine once more, in another form: lowered, or parted for step caching. Needs no PyTorch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from ddpm_runtime.bundle import read_bundle, write_bundle
from ddpm_runtime.errors import ConfigurationError, choose

from .destination import PRECISIONS, check_destination, default_output
from .precision_bundle import lowered_bundle
from .precision_report import PrecisionReport
from .step_cache import StepCacheReport, cached_bundle

__all__ = ["bundle_from_engine"]


def bundle_from_engine(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    precision: str = "fp32",
    step_cache: int | None = None,
    name: str | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Callable[[str], None] = lambda _message: None,
) -> PrecisionReport | StepCacheReport:
    """Write a float32 engine once more, in another form.

    Args:
        path: an engine bundle that you would also run: its network is given to native code.
        output: the bundle to write; None means :func:`.destination.default_output`.
        precision: "fp16" or "bf16" to lower it; "fp32" to leave it.
        step_cache: skip connections outside the deep features, to part it; float32 only.
        name: the engine's name; None means the one it has.
        force: replace an engine bundle that is there.
        threads: of ONNX Runtime; None means what it chooses.
        progress: told what is being done.

    Returns:
        The report, which passed.

    Raises:
        ConfigurationError: the output exists, or is the engine itself; no other form was asked, or
            both; the engine is in sixteen bits already; an unknown precision; not so many skip
            connections.
        BundleError: the engine is not what its manifest says.
        ParityError: it overflows or loses too much, or its parts are not the network; nothing is
            written.
        OSError: the output cannot be written.
    """
    source = Path(path)
    choose("precision", precision, PRECISIONS)
    if (precision == "fp32") == (step_cache is None):
        raise ConfigurationError(
            f"{str(source)!r} is an engine: ask for fp16, for bf16, or for a step cache, and for "
            "one of them at a time."
        )
    form = "cached" if step_cache is not None else precision
    destination = default_output(source, form) if output is None else Path(output)
    if destination.exists() and source.exists() and destination.samefile(source):
        raise ConfigurationError(
            f"{str(destination)!r} is the engine itself, which another form of it must not "
            "replace. Give another --output."
        )
    check_destination(destination, force=force)
    progress(f"reading {source}")
    bundle = read_bundle(source)
    if name:
        manifest = msgspec.structs.replace(bundle.manifest, name=name)
        bundle = dataclasses.replace(bundle, manifest=manifest)
    report: PrecisionReport | StepCacheReport
    if step_cache is not None:
        bundle, report = cached_bundle(bundle, step_cache, threads=threads, progress=progress)
    else:
        bundle, report = lowered_bundle(bundle, precision, threads=threads, progress=progress)
    progress(f"writing {destination}")
    check_destination(destination, force=force)
    write_bundle(destination, bundle.manifest, bundle.network_bytes, bundle.cached)
    return report
