"""Images from a folder: its sub-folders are the classes, in sorted order; with none, no classes.

What is read: files ending in one of ``SUFFIXES``, at any depth inside a class folder. Hidden files
and folders, and files of other kinds, are passed over. Symbolic links are skipped and counted
unless ``follow_links`` says otherwise.

A file that cannot be used (see :mod:`ddpm_train.image_file`) is skipped, counted and listed; more
of them than ``max_bad_fraction`` is an error. A class is decided by its folder alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import DataError

from .config import DataConfig
from .data import ImageDataset, check_memory
from .image_file import SUFFIXES, UnusableImageError, read_image

__all__ = ["read_image_folder"]

# Pictures of kinds that are not read: listed as skipped, because whoever put them there meant them.
_OTHER_PICTURES = frozenset(
    [
        ".apng",
        ".avif",
        ".gif",
        ".heic",
        ".heif",
        ".ico",
        ".jp2",
        ".jxl",
        ".pgm",
        ".ppm",
        ".psd",
        ".svg",
        ".tga",
        ".tif",
        ".tiff",
    ]
)
_SHOWN = 10

Found = tuple[Path, int]  # a file and its class; −1 for none

Outcome = tuple[NDArray[np.uint8], bool] | str  # pixels and whether in colour, or why not
Reader = Callable[[Found], Outcome]


def read_image_folder(folder: Path, config: DataConfig) -> ImageDataset:
    """Decode every image of a folder.

    Raises:
        DataError: no images, an empty class, too many unusable files, or too many for memory.
    """
    classes = _class_folders(folder, config) if config.labels else []
    class_of = {path.name: number for number, path in enumerate(classes)}
    found: list[Found] = []
    for path in _pictures(folder, config):
        top = path.relative_to(folder).parts[0]
        found.append((path, class_of.get(top, -1)))
    if not found:
        raise DataError(
            f"{str(folder)!r} has no images. Put files ending in {', '.join(SUFFIXES)} in it, or "
            "in one sub-folder a class."
        )
    channels = config.image_channels or 3
    check_memory(len(found), config, channels)
    images, kept, skipped, colour = _decode(found, folder, config, with_classes=bool(classes))
    _refuse_too_many(skipped, len(found), folder, config)
    if not config.image_channels and not colour:
        images = images[:, :1].copy()
    if not classes:
        return ImageDataset(images=images, skipped=skipped)
    labels = np.array([found[index][1] for index in kept], np.int64)
    _refuse_empty_classes(labels, classes, folder)
    names = tuple(path.name for path in classes)
    return ImageDataset(images=images, labels=labels, class_names=names, skipped=skipped)


def _decode(
    found: list[Found], folder: Path, config: DataConfig, *, with_classes: bool
) -> tuple[NDArray[np.uint8], list[int], tuple[tuple[str, str], ...], bool]:
    """(images (N, C, H, W), which files they are, (file, why) of the others, any in colour?)."""
    size, channels = config.image_size, config.image_channels or 3
    images = np.empty((len(found), channels, size, size), np.uint8)
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    colour = False

    def read(item: Found) -> Outcome:
        if with_classes and item[1] < 0:
            return "outside the class folders"
        try:
            return read_image(item[0], config)
        except UnusableImageError as error:
            return str(error)

    for index, outcome in enumerate(_in_threads(read, found)):
        if isinstance(outcome, str):
            skipped.append((str(found[index][0].relative_to(folder)), outcome))
            continue
        images[len(kept)], in_colour = outcome
        colour |= in_colour
        kept.append(index)
    return images[: len(kept)], kept, tuple(skipped), colour


def _in_threads(read: Reader, found: list[Found]) -> Iterator[Outcome]:
    """``map(read, found)`` on every core (PIL decodes outside the interpreter lock)."""
    with warnings.catch_warnings():  # PIL warns of oddities inside files; unusable ones raise
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from pool.map(read, found)


def _class_folders(folder: Path, config: DataConfig) -> list[Path]:
    return [
        path
        for path in _sorted_entries(folder)
        if path.is_dir() and (config.follow_links or not path.is_symlink())
    ]


def _pictures(folder: Path, config: DataConfig) -> Iterator[Path]:
    """Files named like pictures, depth first, sorted; every folder once, even if links loop."""
    visited: set[tuple[int, int]] = set()

    def walk(inside: Path) -> Iterator[Path]:
        identity = inside.stat()
        if (identity.st_dev, identity.st_ino) in visited:
            return
        visited.add((identity.st_dev, identity.st_ino))
        for path in _sorted_entries(inside):
            if path.is_dir():
                if config.follow_links or not path.is_symlink():
                    yield from walk(path)
            elif path.suffix.lower() in SUFFIXES or path.suffix.lower() in _OTHER_PICTURES:
                yield path

    return walk(folder)


def _sorted_entries(folder: Path) -> Iterable[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(
            f"cannot list the folder {str(folder)!r}: {error.strerror}. Make it readable, or move "
            "it out of the data."
        ) from error
    return [folder / name for name in names if not name.startswith(".")]


def _refuse_too_many(
    skipped: tuple[tuple[str, str], ...], count: int, folder: Path, config: DataConfig
) -> None:
    if len(skipped) <= config.max_bad_fraction * count and len(skipped) < count:
        return
    listed = "".join(f"\n  {name!r}: {reason}" for name, reason in skipped[:_SHOWN])
    more = f"\n  ... and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    raise DataError(
        f"{len(skipped)} of {count} image files in {str(folder)!r} cannot be used, over the bound "
        f"of {config.max_bad_fraction:.3g} of all:{listed}{more}\nRepair or remove them, or raise "
        "--max-bad-fraction."
    )


def _refuse_empty_classes(labels: NDArray[np.int64], classes: list[Path], folder: Path) -> None:
    counts = np.bincount(labels, minlength=len(classes))
    empty = [path.name for path, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise DataError(
            f"{len(empty)} of the class folders in {str(folder)!r} have no usable image: "
            f"{', '.join(map(repr, empty[:_SHOWN]))}. Remove them, or use --no-labels."
        )
