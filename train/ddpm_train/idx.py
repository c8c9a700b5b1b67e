"""Images from IDX files, the layout of MNIST and its successors, gzip-compressed or not.

    00 00 08 nd │ nd big-endian uint32 sizes │ bytes

A folder holds ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and the same with
``t10k-``; each may end in ``.gz``.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import DataError

from .arrays import dataset_from_arrays
from .config import DataConfig
from .data import ImageDataset, check_memory

__all__ = ["looks_like_idx", "looks_like_idx_folder", "read_idx_folder", "read_idx_images"]

_MAX_DIMENSIONS = 4
_SUFFIXES = ("", ".gz")


def looks_like_idx_folder(folder: Path) -> bool:
    """Whether the folder has an IDX images file of any split."""
    return any((folder / f"{split}-images-idx3-ubyte{suffix}").is_file()
               for split in ("train", "t10k") for suffix in _SUFFIXES)  # fmt: skip


def looks_like_idx(path: Path) -> bool:
    """Whether the name is one that IDX images files have."""
    return "-images" in path.name and "ubyte" in path.name


def read_idx_folder(folder: Path, config: DataConfig) -> ImageDataset:
    """Read the split ``config.split`` of a folder of IDX files.

    Raises:
        DataError: the split is not there, or a file is malformed.
    """
    for suffix in _SUFFIXES:
        images = folder / f"{config.split}-images-idx3-ubyte{suffix}"
        if images.is_file():
            return read_idx_images(images, config)
    raise DataError(
        f"{str(folder)!r} has no {config.split}-images-idx3-ubyte (.gz); choose another --split."
    )


def read_idx_images(path: Path, config: DataConfig) -> ImageDataset:
    """Read an IDX images file, and the labels file beside it if there is one.

    Raises:
        DataError: a file is malformed, or images and labels differ in number.
    """
    images = read_idx(path, config, dimensions=(3, 4))
    labels_name = path.name.replace("-images", "-labels").replace("idx3", "idx1")
    stem = labels_name.removesuffix(".gz")
    beside = [path.with_name(stem + suffix) for suffix in _SUFFIXES]
    found = next((candidate for candidate in beside if candidate.is_file()), None)
    labels = None
    if found is not None and found != path:
        labels = read_idx(found, config, dimensions=(1,))
    return dataset_from_arrays(images, labels, config, str(path))


def read_idx(path: Path, config: DataConfig, dimensions: tuple[int, ...]) -> NDArray[np.uint8]:
    """Read one IDX file of bytes.

    Args:
        path: the file, decompressed on the way if it ends in ``.gz``.
        config: has the bound on memory.
        dimensions: how many dimensions are acceptable.

    Raises:
        DataError: not an IDX file of bytes, truncated, or with bytes left over.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _parse(file, path, config, dimensions)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}. Fetch the file again.") from error


def _parse(
    file: BinaryIO | gzip.GzipFile, path: Path, config: DataConfig, dimensions: tuple[int, ...]
) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) != 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= _MAX_DIMENSIONS:
        raise DataError(
            f"{str(path)!r} is not an IDX file of bytes: it begins with {magic.hex(' ')}, "
            "expected 00 00 08 and the number of dimensions."
        )
    if magic[3] not in dimensions:
        raise DataError(
            f"{str(path)!r} has {magic[3]} dimensions; expected "
            f"{' or '.join(map(str, dimensions))} (labels given for images, or the reverse?)."
        )
    sizes = np.frombuffer(file.read(4 * magic[3]).ljust(4 * magic[3], b"\0"), ">u4")
    shape = tuple(int(size) for size in sizes)
    expected = math.prod(shape)
    if expected > config.max_memory_gib * 2**30:
        check_memory(
            shape[0], config, math.ceil(expected / max(shape[0], 1) / config.image_size**2)
        )
    content = file.read(expected + 1)
    if len(content) != expected:
        relation = "more" if len(content) > expected else f"only {len(content)}"
        raise DataError(
            f"{str(path)!r} says {'×'.join(map(str, shape))} = {expected} bytes but has {relation}:"
            " truncated or altered. Fetch the file again."
        )
    return np.frombuffer(content, np.uint8).reshape(shape)
