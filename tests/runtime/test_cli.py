"""ddpm-run as a person meets it: a process, its pictures, its messages, its exit code."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from ddpm_runtime import Engine
from ddpm_runtime.samplers import SAMPLERS


def ddpm_run(*arguments, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ddpm_runtime", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
    )


def test_it_writes_a_grid_a_gif_and_reports_its_rate(tiny_engine_path, tmp_path):
    done = ddpm_run(
        "--engine", tiny_engine_path, "-n", 9, "--steps", 6, "--class", "all",
        "--out", tmp_path / "grid.png", "--gif", tmp_path / "film.gif",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "grid.png") as sheet, Image.open(tmp_path / "film.gif") as film:
        assert sheet.size == (3 * 10 + 2, 3 * 10 + 2)
        assert film.n_frames == 6
    assert re.search(r"^9 images in [\d.]+ s \([\d.]+ images/s\)", done.stdout, re.MULTILINE)
    assert "images/s" in done.stderr  # the progress bar
    assert "ONNX Runtime" in done.stderr


def test_its_images_are_the_ones_the_engine_draws(tiny_engine_path, tmp_path):
    done = ddpm_run(
        "--engine", tiny_engine_path, "-n", 3, "--steps", 7, "--class", "star", "--seed", 5,
        "--first-index", 2, "--guidance-scale", 3, "--sampler", "ddim", "--eta", 0.5,
        "--spacing", "trailing", "--no-clip", "--batch-size", 2, "--threads", 1,
        "--out", tmp_path / "images.npz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Engine.load(tiny_engine_path) as engine:
        expected = engine.sample(
            3, steps=7, label="star", seed=5, first_index=2, guidance_scale=3, sampler="ddim",
            eta=0.5, spacing="trailing", clip_denoised=False,
        )  # fmt: skip
    with np.load(tmp_path / "images.npz") as archive:
        assert (archive["images"] == expected).all()
        assert archive["indices"].tolist() == [2, 3, 4]


def test_options_of_a_sampler_pass_through(tiny_engine_path, tmp_path):
    done = ddpm_run(
        "--engine", tiny_engine_path, "--sampler", "ddpm", "--steps", 5, "-n", 1,
        "--option", "variance=fixed_large", "--out", tmp_path / "i.npz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Engine.load(tiny_engine_path) as engine:
        expected = engine.sample(
            1, sampler="ddpm", steps=5, sampler_options={"variance": "fixed_large"}
        )
    with np.load(tmp_path / "i.npz") as archive:
        assert (archive["images"] == expected).all()


def test_a_folder_gets_one_file_an_image(tiny_engine_path, tmp_path):
    done = ddpm_run("--engine", tiny_engine_path, "-n", 2, "--steps", 2, "-o", tmp_path / "many")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["000000.png", "000001.png"]


def test_info_prints_the_manifest(tiny_engine_path):
    done = ddpm_run("--engine", tiny_engine_path, "--info")
    assert done.returncode == 0
    assert json.loads(done.stdout)["network"]["class_names"] == ["circle", "square", "star"]


def test_every_sampler_is_listed_with_its_source():
    done = ddpm_run("--list-samplers")
    assert done.returncode == 0
    for name, sampler in SAMPLERS.items():
        line = next(line for line in done.stdout.splitlines() if line.split()[0] == name)
        assert sampler.source in line


MISUSE = {
    "no engine": ([], 2, "--engine"),
    "zero steps": (["--steps", 0], 2, "between 1 and 100"),
    "too many steps": (["--steps", 101], 2, "nearest valid choice is 100"),
    "wrong class": (["--class", "7"], 2, "classes 0 to 2"),
    "wrong class name": (["--class", "sqare"], 2, "Did you mean 'square'"),
    "wrong sampler": (["--sampler", "ddmp"], 2, "Did you mean 'ddpm'"),
    "wrong eta": (["--eta", 2], 2, "nearest valid choice is 1"),
    "no images": (["-n", 0], 2, "≥ 1"),
    "not a number": (["--steps", "many"], 2, "not a valid integer"),
    "wrong option": (["--option", "order"], 2, "KEY=VALUE"),
    "wrong suffix": (["--out", "x.jpg"], 2, ".png"),
    "missing folder": (["--out", "no/such/folder/x.png"], 1, "make it first"),
    "guidance without class": (["--guidance-scale", 2], 2, "give label"),
    "no threads": (["--threads", 0], 2, "threads"),
}


@pytest.mark.parametrize("kind", MISUSE)
def test_misuse_is_one_line_with_the_remedy_and_writes_nothing(tiny_engine_path, tmp_path, kind):
    arguments, code, remedy = MISUSE[kind]
    engine = [] if kind == "no engine" else ["--engine", tiny_engine_path]
    done = ddpm_run(*engine, *arguments, cwd=tmp_path)
    assert done.returncode == code
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_unwritable_destination_is_refused_before_sampling(tiny_engine_path, tmp_path):
    (tmp_path / "taken").write_text("a file, not a folder")
    done = ddpm_run("--engine", tiny_engine_path, "-o", tmp_path / "taken")
    assert done.returncode == 1
    assert "choose another --out" in done.stderr
    assert (tmp_path / "taken").read_text() == "a file, not a folder"


def damaged(tiny_engine_path, tmp_path, kind):
    copy = shutil.copytree(tiny_engine_path, tmp_path / "damaged.engine")
    manifest = json.loads((copy / "manifest.json").read_text())
    network = (copy / "network.onnx").read_bytes()
    if kind == "from the future":
        manifest["format_version"] = 99
    elif kind == "truncated":
        (copy / "network.onnx").write_bytes(network[:100])
    elif kind == "altered":
        (copy / "network.onnx").write_bytes(network[:-1] + b"\x00")
    elif kind == "not an engine":
        (copy / "manifest.json").unlink()
        return copy
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("not an engine", "not an engine bundle"),
        ("from the future", "pip install -U ddpm-engine"),
        ("truncated", "is truncated"),
        ("altered", "is not the file that was exported"),
    ],
)
def test_a_damaged_engine_is_one_line_with_the_remedy(tiny_engine_path, tmp_path, kind, remedy):
    path = damaged(tiny_engine_path, tmp_path, kind)
    done = ddpm_run("--engine", path, "--out", tmp_path / "x.png")
    assert done.returncode == 1
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_finished_and_exits_130(tiny_engine_path, tmp_path, sent):
    # one image at a time; far more images than can be drawn before the signal
    process = subprocess.Popen(
        [
            sys.executable, "-m", "ddpm_runtime", "--engine", str(tiny_engine_path),
            "-n", "200000", "--steps", "20", "--batch-size", "1", "--out", str(tmp_path / "i.npz"),
        ],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(600):  # wait for the progress bar to move
        if re.search(r"\| [1-9]", process.stderr.read(40)):
            break
    time.sleep(0.2)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    kept = int(re.search(r"interrupted: (\d+) of 200000", stderr)[1])
    assert kept > 0
    with np.load(tmp_path / "i.npz") as archive:
        assert len(archive["images"]) == kept
        assert archive["indices"].tolist() == list(range(kept))
        with Engine.load(tiny_engine_path) as engine:
            count = min(kept, 20)
            assert (archive["images"][:count] == engine.sample(count, steps=20)).all()
    assert f"{kept} images in" in stdout


def picture(path, values):
    Image.fromarray(values).save(path)
    return path


def test_pictures_can_be_started_from_kept_in_part_encoded_and_morphed(tiny_engine_path, tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 8), dtype=np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:3] = 255
    shot, kept = picture(tmp_path / "a.png", image), picture(tmp_path / "mask.png", mask)
    base = ["--engine", tiny_engine_path, "--steps", 10, "-n", 3]

    def images(*arguments):
        done = ddpm_run(*base, *arguments, "--out", tmp_path / "out.npz")
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "out.npz") as archive:
            return archive["images"]

    painted = images("--image", shot, "--mask", kept)
    assert (painted[:, :3, :, 0] == image[:3]).all()
    with Engine.load(tiny_engine_path) as engine:
        started = engine.sample(3, steps=10, image=image[..., None], strength=0.3)
        assert (images("--image", shot, "--strength", 0.3) == started).all()
        x_T = np.repeat(engine.encode(image[None, ..., None], steps=10, label=1), 3, axis=0)
        drawn = engine.sample(3, steps=10, x_T=x_T, label=1)
        assert (images("--image", shot, "--encode", "--class", 1) == drawn).all()
        ends = engine.sample(8, steps=10)
    morphed = images("--interpolate", 2, 7)
    assert (morphed[0] == ends[2]).all()
    assert np.abs(morphed[2].astype(int) - ends[7]).max() <= 1  # sin θ / sin θ may round
    guided = images("--class", 1, "--guidance-scale", 5, "--guidance-interval", 95, 99)
    assert (guided == images("--class", 1, "--guidance-scale", 1)).all()


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--encode"], "give --image"),
        (["--image", "text.png", "--strength", 0.5], "not a picture"),
        (["--image", "missing.png", "--strength", 0.5], "No such file"),
        (["--strength", 0.5], "give image"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(tiny_engine_path, tmp_path, arguments, remedy):
    (tmp_path / "text.png").write_text("not a picture")
    done = ddpm_run("--engine", tiny_engine_path, *arguments, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert remedy in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "samples.png").exists()
