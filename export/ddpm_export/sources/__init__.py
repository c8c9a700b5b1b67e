"""Kinds of checkpoints that can be exported, one file each.

Adding a kind is adding a file with a :class:`Source` and an entry to :data:`SOURCES`. The first
that recognises a path reads it.
"""

from __future__ import annotations

from pathlib import Path

from ddpm_runtime.errors import CheckpointError

from .base import Source, TrainedNetwork
from .checkpoint_file import CHECKPOINT_FILE
from .diffusers_folder import DIFFUSERS_FOLDER

__all__ = ["SOURCES", "Source", "TrainedNetwork", "network_from_path"]

SOURCES: tuple[Source, ...] = (CHECKPOINT_FILE, DIFFUSERS_FOLDER)


def network_from_path(path: Path) -> TrainedNetwork:
    """Read a checkpoint of any known kind.

    Raises:
        CheckpointError: nothing there, no known kind, or what the kind itself refuses.
    """
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {str(path)!r}: there is no such file.")
    for source in SOURCES:
        if source.recognises(path):
            return source.load(path)
    kinds = "; ".join(source.what for source in SOURCES)
    hint = " (it is an engine already: give it to ddpm-run)" if path.suffix == ".engine" else ""
    raise CheckpointError(f"{str(path)!r} is no checkpoint known here{hint}. Possible: {kinds}.")
