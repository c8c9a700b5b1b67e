"""Real data when it is there, invented garments when it is not."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

DATA_VARIABLE = "DDPM_FASHION_MNIST"


@pytest.fixture(scope="session")
def fashion_mnist_path() -> Path:
    """The real data set; skips, naming what is missing, without it."""
    named = os.environ.get(DATA_VARIABLE)
    if not named:
        pytest.skip(f"{DATA_VARIABLE} does not name the folder of Fashion-MNIST's IDX files")
    folder = Path(named)
    if not (folder / "t10k-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"{DATA_VARIABLE}={folder} has no t10k-images-idx3-ubyte.gz")
    return folder


def invented_images(count: int, seed: int) -> np.ndarray:
    """(count, 28, 28, 1) uint8: a bright rectangle of random size on black."""
    rng = np.random.default_rng(seed)
    images = np.zeros((count, 28, 28, 1), np.uint8)
    for image in images:
        top, left = rng.integers(0, 10, 2)
        bottom, right = rng.integers(14, 28, 2)
        image[top:bottom, left:right] = rng.integers(60, 255)
    return images


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(
        size.to_bytes(4, "big") for size in array.shape
    )
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="session")
def invented_data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like Fashion-MNIST's with 200 training and 100 held-out images, 10 classes."""
    folder = tmp_path_factory.mktemp("invented")
    for split, count, seed in (("train", 200, 0), ("t10k", 100, 1)):
        write_idx(folder / f"{split}-images-idx3-ubyte", invented_images(count, seed)[..., 0])
        write_idx(folder / f"{split}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return folder


@pytest.fixture(scope="session")
def garment_engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of 28×28 grey images and 10 classes that draws noise, fast."""
    from ddpm_runtime.bundle import Defaults, Image, Manifest, Network, write_bundle
    from helpers.tiny_engine import tiny_network_bytes

    path = tmp_path_factory.mktemp("engines") / "garments.engine"
    manifest = Manifest(
        name="garments",
        image=Image(height=28, width=28, channels=1),
        network=Network(prediction_type="epsilon", num_classes=10, opset=18),
        schedule={"name": "linear", "num_train_timesteps": 20},
        defaults=Defaults(steps=4),
    )
    write_bundle(path, manifest, tiny_network_bytes(size=28, num_classes=10))
    return path
