"""Images in .npy, .npz and IDX files."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from ddpm_runtime.errors import DataError
from ddpm_train.config import DataConfig
from ddpm_train.data import open_dataset

CONFIG = DataConfig(image_size=8)
GREY = np.random.default_rng(0).integers(256, size=(5, 8, 8), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
LABELS = np.array([2, 0, 1, 0, 2])


def test_npy_of_grey_images(tmp_path):
    np.save(tmp_path / "images.npy", GREY)
    dataset = open_dataset(tmp_path / "images.npy", CONFIG)
    assert (dataset.images[:, 0] == GREY).all()
    assert dataset.labels is None


def test_npz_of_colour_images_with_labels(tmp_path):
    np.savez_compressed(tmp_path / "data.npz", images=COLOUR, labels=LABELS)
    dataset = open_dataset(tmp_path / "data.npz", CONFIG)
    assert (dataset.images == COLOUR.transpose(0, 3, 1, 2)).all()
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.class_names == ("0", "1", "2")


def test_a_lone_array_of_an_npz_is_the_images_whatever_its_name(tmp_path):
    np.savez(tmp_path / "data.npz", arr_0=GREY)
    assert len(open_dataset(tmp_path / "data.npz", CONFIG)) == 5


def test_class_names_may_come_from_the_config(tmp_path):
    np.savez(tmp_path / "data.npz", images=GREY, labels=LABELS)
    named = DataConfig(image_size=8, class_names=("coat", "bag", "shoe"))
    assert open_dataset(tmp_path / "data.npz", named).class_names == ("coat", "bag", "shoe")
    with pytest.raises(DataError, match="at least 3"):
        open_dataset(tmp_path / "data.npz", DataConfig(image_size=8, class_names=("coat",)))


def test_colour_becomes_grey_as_pillow_does_it(tmp_path):
    np.save(tmp_path / "images.npy", COLOUR)
    dataset = open_dataset(tmp_path / "images.npy", DataConfig(image_size=8, image_channels=1))
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in COLOUR])
    assert np.abs(dataset.images[:, 0].astype(int) - expected).max() <= 1  # fixed-point rounding


def test_grey_becomes_colour_by_repetition(tmp_path):
    np.save(tmp_path / "images.npy", GREY)
    dataset = open_dataset(tmp_path / "images.npy", DataConfig(image_size=8, image_channels=3))
    assert (dataset.images == GREY[:, None]).all()


class Hostile:
    def __reduce__(self):
        return exec, ("open('canary', 'w')",)


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_python_objects_in_arrays_are_refused_and_run_nothing(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.array([Hostile()], dtype=object)
    (np.save if name.endswith("npy") else np.savez)(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(DataError, match="Python objects are refused"):
        open_dataset(tmp_path / name, CONFIG)
    assert not (tmp_path / "canary").exists()


BAD_ARRAYS = {
    "floats": ({"images": GREY / 255.0}, "uint8"),
    "two dimensions": ({"images": GREY[0]}, r"shape \(8, 8\)"),
    "four channels": ({"images": np.zeros((2, 8, 8, 4), np.uint8)}, "1 or 3 channels"),
    "channels first": ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, "1 or 3 channels, last"),
    "none": ({"images": np.zeros((0, 8, 8), np.uint8)}, "0"),
    "too few labels": ({"images": GREY, "labels": LABELS[:-1]}, r"\(5,\)"),
    "labels of floats": ({"images": GREY, "labels": LABELS * 1.0}, "whole numbers"),
    "negative labels": ({"images": GREY, "labels": LABELS - 1}, "-1"),
    "no images": ({"pictures": GREY, "labels": LABELS}, "'images'"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_of_a_wrong_kind_are_refused(tmp_path, case):
    arrays, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "data.npz", CONFIG)


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_array_files_are_refused(tmp_path, name, share):
    path = tmp_path / name
    np.save(path, GREY) if name.endswith("npy") else np.savez(path, images=GREY)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(DataError, match="cannot read"):
        open_dataset(path, CONFIG)


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
def test_arrays_over_the_bound_on_memory_are_refused_before_they_are_decompressed(tmp_path, name):
    blank = np.zeros((3000, 32, 32), np.uint8)  # 3 kB when compressed
    path = tmp_path / name
    np.save(path, blank) if name.endswith("npy") else np.savez_compressed(path, images=blank)
    with pytest.raises(DataError, match="--max-memory-gib"):
        open_dataset(path, DataConfig(image_size=8, max_memory_gib=1e-3))


# --- IDX -----------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_split(folder, split: str, images: np.ndarray, labels, *, zipped: bool) -> None:
    files = [("images-idx3", images)] + ([("labels-idx1", labels)] if labels is not None else [])
    for name, array in files:
        path = folder / f"{split}-{name}-ubyte{'.gz' if zipped else ''}"
        path.write_bytes(gzip.compress(idx(array)) if zipped else idx(array))


@pytest.mark.parametrize("zipped", [False, True])
def test_an_idx_folder_gives_the_split_that_is_asked_for(tmp_path, zipped):
    write_split(tmp_path, "train", GREY, LABELS, zipped=zipped)
    write_split(tmp_path, "t10k", GREY[:2] ^ 255, LABELS[:2], zipped=zipped)
    train = open_dataset(tmp_path, CONFIG)
    assert (train.images[:, 0] == GREY).all()
    assert train.labels.tolist() == LABELS.tolist()
    held_out = open_dataset(tmp_path, DataConfig(image_size=8, split="t10k"))
    assert (held_out.images[:, 0] == GREY[:2] ^ 255).all()


def test_an_idx_images_file_finds_its_labels_beside_it(tmp_path):
    write_split(tmp_path, "train", GREY, LABELS, zipped=True)
    dataset = open_dataset(tmp_path / "train-images-idx3-ubyte.gz", CONFIG)
    assert dataset.labels.tolist() == LABELS.tolist()


def test_an_idx_images_file_may_have_no_labels(tmp_path):
    write_split(tmp_path, "train", GREY, None, zipped=False)
    assert open_dataset(tmp_path, CONFIG).labels is None


def test_a_missing_split_is_named(tmp_path):
    write_split(tmp_path, "train", GREY, LABELS, zipped=False)
    with pytest.raises(DataError, match="no t10k-images"):
        open_dataset(tmp_path, DataConfig(image_size=8, split="t10k"))


BAD_IDX = {
    "empty": b"",
    "not idx": b"hello, I am a text file",
    "floats": b"\0\0\x0d\x03" + idx(GREY)[4:],
    "truncated": idx(GREY)[:-1],
    "one byte more": idx(GREY) + b"\0",
    "header cut": idx(GREY)[:9],
    "one dimension": idx(LABELS),
    "says it is huge": b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**10, 2**10),
}


@pytest.mark.parametrize("case", BAD_IDX)
@pytest.mark.parametrize("zipped", [False, True])
def test_bad_idx_files_are_refused(tmp_path, case, zipped):
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if zipped else ''}"
    path.write_bytes(gzip.compress(BAD_IDX[case]) if zipped else BAD_IDX[case])
    with pytest.raises(DataError):
        open_dataset(path, CONFIG)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    content = bytearray(gzip.compress(idx(GREY)))
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read|truncated"):
        open_dataset(path, CONFIG)


def test_images_and_labels_of_different_number_are_refused(tmp_path):
    write_split(tmp_path, "train", GREY, LABELS[:3], zipped=False)
    with pytest.raises(DataError, match=r"\(5,\)"):
        open_dataset(tmp_path, CONFIG)


def test_a_file_of_an_unknown_kind_is_refused_with_the_kinds_that_are_read(tmp_path):
    (tmp_path / "data.csv").write_text("1,2,3")
    with pytest.raises(DataError, match=r"\.npz or \.npy, or an IDX file"):
        open_dataset(tmp_path / "data.csv", CONFIG)
