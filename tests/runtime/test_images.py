"""ddpm_runtime/images.py."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.images import grid, save_gif, save_images, save_png, to_uint8


def test_the_ends_and_the_middle_of_the_range_land_where_they_should():
    values = np.float32([-1, -2, 1, 3, 0, -1 + 1 / 127.5, -0.999, 0.999]).reshape(1, 1, 2, 4)
    assert to_uint8(values)[0, ..., 0].ravel().tolist() == [0, 0, 255, 255, 128, 1, 0, 255]


def test_every_byte_survives_the_way_to_float_and_back():
    byte = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    as_float = (byte.astype(np.float32) / np.float32(127.5)) - np.float32(1)
    assert (to_uint8(as_float)[..., 0] == byte[:, 0]).all()


def test_channels_move_to_the_end():
    image = np.stack([np.full((2, 3), v, np.float32) for v in (-1, 0, 1)])
    assert to_uint8(image).shape == (2, 3, 3)
    assert to_uint8(image)[0, 0].tolist() == [0, 128, 255]


def test_a_grid_holds_every_image_once_in_reading_order():
    images = np.arange(1, 8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 5, 1), np.uint8)
    sheet = grid(images, padding=1)
    assert sheet.shape == (3 * 5 + 1, 3 * 6 + 1, 1)
    for i in range(7):
        top, left = 1 + (i // 3) * 5, 1 + (i % 3) * 6
        assert (sheet[top : top + 4, left : left + 5] == i + 1).all()
    assert (sheet == 255).sum() == sheet.size - 7 * 20


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_read_back_as_they_were(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 6, 7, channels), dtype=np.uint8)
    save_png(tmp_path / "one.png", images[0])
    assert (np.asarray(Image.open(tmp_path / "one.png")).reshape(6, 7, channels) == images[0]).all()

    files = save_images(tmp_path / "folder", images, indices=range(40, 45))
    assert [file.name for file in files][0::4] == ["000040.png", "000044.png"]
    read = np.asarray(Image.open(files[3])).reshape(6, 7, channels)
    assert (read == images[3]).all()

    save_images(tmp_path / "all.npz", images, indices=range(40, 45))
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        assert (archive["images"] == images).all()
        assert archive["indices"].tolist() == [40, 41, 42, 43, 44]

    save_gif(tmp_path / "film.gif", list(images), frame_ms=50, hold_ms=500)
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 5
        assert film.size == (7, 6)


def test_the_same_image_gives_the_same_png_bytes(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("a.png", "b.png"):
        save_png(tmp_path / name, image)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_no_picture_can_show_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="npz"):
        save_png(tmp_path / "x.png", np.zeros((2, 2, 5), np.uint8))
    with pytest.raises(ConfigurationError, match=r"\.png"):
        save_images(tmp_path / "x.jpg", np.zeros((1, 2, 2, 1), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_png_is_nothing_but_pixels(tmp_path):
    save_png(tmp_path / "x.png", np.zeros((2, 2, 1), np.uint8))
    picture = Image.open(io.BytesIO((tmp_path / "x.png").read_bytes()))
    assert picture.mode == "L"
    assert not picture.info
