"""A folder of images: what is read, what is skipped, and that nothing in it can do harm."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_runtime.errors import DataError
from ddpm_train.config import DataConfig
from ddpm_train.data import open_dataset
from ddpm_train.resize import fit_array

TOLERANT = DataConfig(image_size=8, max_bad_fraction=0.9)


def picture(seed: int = 0, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """Noise; ``mode`` is RGB or L."""
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    pixels = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def good_folder(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture(number).save(folder / f"good-{number}.png")
    return folder


# --- what is read --------------------------------------------------------------------------------


def test_pixels_of_a_fitting_png_arrive_untouched(tmp_path):
    picture(3).save(tmp_path / "a.png")
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    assert (dataset.images[0].transpose(1, 2, 0) == np.asarray(picture(3))).all()
    assert dataset.labels is None
    assert dataset.class_names == ()


def test_sub_folders_are_classes_in_sorted_order_at_any_depth(tmp_path):
    for number, name in enumerate(["zebra", "ant", "mole/deep/deeper"]):
        good_folder(tmp_path / name, number + 1)
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    assert dataset.class_names == ("ant", "mole", "zebra")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1, 2]


def test_the_order_of_images_does_not_depend_on_the_order_of_files_on_the_disk(tmp_path):
    for number in [7, 2, 9, 0]:
        Image.new("L", (8, 8), 10 * number).save(tmp_path / f"{number}.png")
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    assert dataset.images[:, 0, 0, 0].tolist() == [0, 20, 70, 90]


def test_labels_can_be_left_out(tmp_path):
    good_folder(tmp_path / "a")
    good_folder(tmp_path / "b")
    dataset = open_dataset(tmp_path, DataConfig(image_size=8, labels=False))
    assert len(dataset) == 8
    assert dataset.labels is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp", ".bmp"])
def test_every_accepted_format_is_read(tmp_path, suffix):
    Image.new("RGB", (12, 12), (200, 100, 50)).save(tmp_path / f"a{suffix}")
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    centre = dataset.images[0, :, 4, 4].astype(int)
    assert np.abs(centre - [200, 100, 50]).max() <= 6  # JPEG and WebP lose a little


def test_a_folder_of_grey_images_has_one_channel_and_a_mixed_one_three(tmp_path):
    picture(0, mode="L").save(tmp_path / "grey.png")
    assert open_dataset(tmp_path, DataConfig(image_size=8)).images.shape == (1, 1, 8, 8)
    picture(1).save(tmp_path / "colour.png")
    assert open_dataset(tmp_path, DataConfig(image_size=8)).images.shape == (2, 3, 8, 8)
    forced = open_dataset(tmp_path, DataConfig(image_size=8, image_channels=1))
    assert forced.images.shape == (2, 1, 8, 8)


def test_transparency_is_composited_over_white(tmp_path):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 4))
    clear.save(tmp_path / "a.png")
    image = open_dataset(tmp_path, DataConfig(image_size=8)).images[0]
    assert image[:, 0, 0].tolist() == [0, 0, 255]
    assert image[:, 7, 0].tolist() == [255, 255, 255]


def test_palettes_two_level_images_and_cmyk_become_plain_pixels(tmp_path):
    Image.new("RGB", (8, 8), (0, 128, 0)).quantize(2).save(tmp_path / "palette.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "two-level.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")  # red, as printed
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    colours = [image[:, 4, 4].astype(int) for image in dataset.images]
    for found, expected in zip(colours, [(0, 128, 0), (255, 0, 0), (255,) * 3], strict=True):
        assert np.abs(found - expected).max() <= 8


def test_exif_orientation_is_applied(tmp_path):
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    upright.rotate(180).save(tmp_path / "a.png", exif=exif)
    image = open_dataset(tmp_path, DataConfig(image_size=8)).images[0]
    assert image[0, 0, 0] == 255
    assert image[0, 7, 0] == 0


def test_other_sizes_are_cropped_to_the_centre_and_resized(tmp_path):
    wide = picture(0, (64, 16), "L")
    wide.save(tmp_path / "a.png")
    image = open_dataset(tmp_path, DataConfig(image_size=8)).images[0, 0]
    whole = np.asarray(wide.resize((32, 8), Image.Resampling.LANCZOS))
    assert np.abs(image.astype(int) - whole[:, 12:20]).max() <= 1


def test_resizing_keeps_the_mean_of_an_image():
    image = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    fitted = fit_array(image, 8)
    assert fitted.shape == (8, 8, 3)
    assert abs(fitted.mean() - image.mean()) < 2.0  # edges weigh a little more in Lanczos


# --- what is skipped -----------------------------------------------------------------------------


def png_chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def png_bomb(path: Path) -> None:
    """A small file that says it has 900 million pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1_000_000), 9)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def text_bomb(path: Path) -> None:
    """A PNG with a compressed comment of half a gigabyte."""
    picture().save(path)
    content = path.read_bytes()
    comment = b"Comment\0\0" + zlib.compress(bytes(500_000_000), 1)
    path.write_bytes(content[:33] + png_chunk(b"zTXt", comment) + content[33:])


def cut(path: Path, share: float) -> None:
    picture(0, (64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_a_byte(path: Path) -> None:
    picture(0, (64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def animation(path: Path) -> None:
    picture(0).save(path, save_all=True, append_images=[picture(1), picture(2)])


BAD = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("not an image"),
    "truncated.png": lambda path: cut(path, 0.5),
    "barely-truncated.png": lambda path: cut(path, 0.99),
    "truncated.jpg": lambda path: cut(path, 0.7),
    "truncated.webp": lambda path: cut(path, 0.5),
    "truncated.bmp": lambda path: cut(path, 0.5),
    "header-only.png": lambda path: cut(path, 0.003),
    "damaged.png": flip_a_byte,
    "bomb.png": png_bomb,
    "text-bomb.png": text_bomb,
    "over-the-bound.png": lambda path: Image.new("1", (2000, 600)).save(path),
    "animated.webp": animation,
    "animated.png": animation,
    "a-gif-in-disguise.png": lambda path: picture().save(path, format="GIF"),
    "a-tiff-in-disguise.jpg": lambda path: picture().save(path, format="TIFF"),
    "an-icon.ico": lambda path: picture().save(path, format="ICO"),
    "a-gif.gif": lambda path: picture().save(path),
    "sixteen-bits.png": lambda path: Image.new("I;16", (8, 8), 40_000).save(path),
    "pipe.png": lambda path: os.mkfifo(path),
    "link-to-a-file.png": lambda path: path.symlink_to(path.parent / "good-0.png"),
    "link-to-nothing.png": lambda path: path.symlink_to("nowhere"),
    "link-to-itself.png": lambda path: path.symlink_to(path.name),
    "link-to-a-device.png": lambda path: path.symlink_to("/dev/zero"),
    "vector.svg": lambda path: path.write_text("<svg/>"),
    "postscript.png": lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\nquit\n"),
}


def test_every_kind_of_bad_file_is_skipped_counted_and_listed(tmp_path):
    good_folder(tmp_path)
    for name, plant in BAD.items():
        plant(tmp_path / name)
    config = DataConfig(image_size=8, max_bad_fraction=0.9, max_megapixels=1.0)
    dataset = open_dataset(tmp_path, config)
    assert sorted(name for name, _why in dataset.skipped) == sorted(BAD)
    assert all(why for _name, why in dataset.skipped)
    assert len(dataset) == 4
    for number, image in enumerate(dataset.images):
        assert (image.transpose(1, 2, 0) == np.asarray(picture(number))).all()


@pytest.mark.parametrize("name", ["a-device.png", "unreadable.png"])
def test_devices_and_unreadable_files_are_skipped(tmp_path, name):
    good_folder(tmp_path)
    if name == "a-device.png":
        try:
            os.mknod(tmp_path / name, 0o20666, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("making a device node needs root")
    else:
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        picture().save(tmp_path / name)
        (tmp_path / name).chmod(0)
    dataset = open_dataset(tmp_path, TOLERANT)
    assert [skipped for skipped, _why in dataset.skipped] == [name]


def test_sixteen_bit_colour_is_refused_not_silently_halved(tmp_path):
    good_folder(tmp_path)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(48) for _ in range(8)))
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    dataset = open_dataset(tmp_path, TOLERANT)
    assert dataset.skipped == (("deep.png", "16 bits a channel or more"),)


def test_links_are_followed_when_asked_and_loops_of_folders_end(tmp_path):
    good_folder(tmp_path / "elsewhere", 2)
    data = tmp_path / "data"
    good_folder(data / "a", 1)
    (data / "a" / "link.png").symlink_to(tmp_path / "elsewhere" / "good-1.png")
    (data / "a" / "loop").symlink_to(data / "a")
    (data / "b").symlink_to(tmp_path / "elsewhere")
    closed = open_dataset(data, TOLERANT)
    assert (closed.class_names, len(closed), len(closed.skipped)) == (("a",), 1, 1)
    followed = open_dataset(data, DataConfig(image_size=8, follow_links=True))
    assert followed.labels.tolist() == [0, 0, 1, 1]


def test_one_percent_of_bad_files_is_tolerated_and_more_is_not(tmp_path):
    for number in range(99):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number:03}.png")
    (tmp_path / "bad-0.png").write_bytes(b"")
    assert len(open_dataset(tmp_path, DataConfig(image_size=8))) == 99
    (tmp_path / "bad-1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 101 [\s\S]*bad-1\.png[\s\S]*--max-bad-fraction"):
        open_dataset(tmp_path, DataConfig(image_size=8))


def test_a_folder_of_bad_files_alone_is_an_error_whatever_is_tolerated(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 1"):
        open_dataset(tmp_path, DataConfig(image_size=8, max_bad_fraction=1.0))


def test_hidden_files_and_other_kinds_of_file_are_passed_over(tmp_path):
    good_folder(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    dataset = open_dataset(tmp_path, DataConfig(image_size=8))
    assert (len(dataset), dataset.skipped, dataset.labels) == (4, (), None)


def test_images_beside_the_class_folders_are_skipped_by_name(tmp_path):
    good_folder(tmp_path / "a")
    picture().save(tmp_path / "stray.png")
    dataset = open_dataset(tmp_path, TOLERANT)
    assert dataset.skipped == (("stray.png", "outside the class folders"),)


def test_an_empty_folder_says_what_to_put_there(tmp_path):
    with pytest.raises(DataError, match=r"no images\. Put files ending in \.png"):
        open_dataset(tmp_path, DataConfig())


def test_an_empty_class_is_named(tmp_path):
    good_folder(tmp_path / "full")
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="'void'"):
        open_dataset(tmp_path, DataConfig(image_size=8))


def test_more_images_than_memory_allows_are_refused_before_decoding(tmp_path):
    good_folder(tmp_path, 3)
    with pytest.raises(DataError, match="--max-memory-gib"):
        open_dataset(tmp_path, DataConfig(image_size=1024, max_memory_gib=1e-3))


@pytest.mark.parametrize("make", [lambda path: None, os.mkfifo])
def test_a_path_that_is_no_data_is_refused(tmp_path, make):
    make(tmp_path / "data")
    with pytest.raises(DataError, match="data"):
        open_dataset(tmp_path / "data", DataConfig())
