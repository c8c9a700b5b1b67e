"""ddpm-train on the command line, recipes, previews and the curve."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import tiny_config, tiny_dataset

from ddpm_runtime.errors import ConfigurationError
from ddpm_runtime.schedule import make_schedule
from ddpm_train import __main__ as command
from ddpm_train.checkpoint import load_checkpoint
from ddpm_train.config import TrainConfig, config_from_mapping, config_from_recipe
from ddpm_train.curve import draw_curve
from ddpm_train.flags import resolve_config
from ddpm_train.preview import sample_images

RECIPES = sorted((Path(__file__).parents[2] / "train" / "recipes").glob("*.json"))


@pytest.fixture
def images(tmp_path) -> Path:
    """An .npz of 20 labelled images."""
    dataset = tiny_dataset()
    np.savez(tmp_path / "data.npz", images=dataset.images[:, 0], labels=dataset.labels)
    return tmp_path / "data.npz"


@pytest.fixture
def recipe(tmp_path) -> Path:
    (tmp_path / "tiny.json").write_bytes(msgspec.json.encode(tiny_config().to_dict()))
    return tmp_path / "tiny.json"


def run(monkeypatch, capsys, *arguments: object) -> SimpleNamespace:
    """Run ddpm-train in this process: .code, .out, .err."""
    monkeypatch.setattr(sys, "argv", ["ddpm-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    captured = capsys.readouterr()
    return SimpleNamespace(code=stop.value.code or 0, out=captured.out, err=captured.err)


def test_images_and_a_recipe_make_a_checkpoint(monkeypatch, capsys, tmp_path, images, recipe):
    out = tmp_path / "run"
    done = run(
        monkeypatch, capsys, "--data", images, "--out", out, "--config", recipe,
        "--steps", 4, "--sample-every", 4, "--sample-count", 5,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "model.pt")
    assert "20 images of 8×8, grey, 3 classes" in done.err
    assert "loss=" in done.err
    assert load_checkpoint(out / "model.pt").step == 4
    assert config_from_recipe(out / "recipe.json").optimization.steps == 4
    with Image.open(out / "samples" / "00000004.png") as sheet:
        assert sheet.size == (3 * 10 + 2, 2 * 10 + 2)  # 5 images of 8 pixels, 2 between


def test_resume_needs_neither_recipe_nor_flags(monkeypatch, capsys, tmp_path, images, recipe):
    where = ["--data", images, "--out", tmp_path / "run"]
    assert run(monkeypatch, capsys, *where, "--config", recipe, "--steps", 2).code == 0
    done = run(monkeypatch, capsys, *where, "--resume", "--steps", 5)
    assert done.code == 0, done.err
    assert load_checkpoint(tmp_path / "run" / "model.pt").step == 5


def misuses(tmp_path: Path, images: Path, recipe: Path) -> dict[str, tuple[list, int, str]]:
    """name: (arguments, exit code, what the message must say)."""
    where = ["--data", images, "--out", tmp_path / "run"]
    (tmp_path / "bad.json").write_text('{"optimisation": {}}')
    (tmp_path / "worse.json").write_text("{")
    (tmp_path / "typed.json").write_text('{"run": {"seed": "zero"}}')
    (tmp_path / "field.json").write_text('{"run": {"sede": 0}}')
    (tmp_path / "void").mkdir()
    (tmp_path / "file").write_text("")
    return {
        "nothing": ([], 2, "--data"),
        "no such data": (["--data", tmp_path / "no", "--out", "x"], 1, "no data at"),
        "empty folder": (["--data", tmp_path / "void", "--out", "x"], 1, "no images"),
        "no such recipe": ([*where, "--config", "no.json"], 2, "cannot read the recipe"),
        "unknown section": ([*where, "--config", tmp_path / "bad.json"], 2, "'optimization'?"),
        "unknown field": ([*where, "--config", tmp_path / "field.json"], 2, "'seed'?"),
        "broken recipe": ([*where, "--config", tmp_path / "worse.json"], 2, "not JSON"),
        "wrong type": ([*where, "--config", tmp_path / "typed.json"], 2, "$.run.seed"),
        "unknown flag": ([*where, "--step", 3], 2, "--steps"),
        "no number": ([*where, "--steps", "many"], 2, "'many'"),
        "no steps": ([*where, "--steps", 0], 2, "steps must be between 1"),
        "no list": ([*where, "--channel-multipliers", "1,x"], 2, "1,2,2"),
        "unknown loss": ([*where, "--loss", "l3"], 2, "'l2'"),
        "unknown schedule": ([*where, "--schedule", "linaer"], 2, "'linear'?"),
        "not a number": ([*where, "--learning-rate", "nan"], 2, "learning_rate"),
        "nothing to resume": ([*where, "--resume"], 1, "nothing to resume"),
        "odd size": ([*where, "--config", recipe, "--image-size", 9], 2, "cannot be halved"),
        "out is a file": (
            ["--data", images, "--out", tmp_path / "file", "--config", recipe], 2, "cannot make",
        ),
        "out is nowhere": (
            ["--data", images, "--out", "/proc/no/run", "--config", recipe], 2, "another --out",
        ),
        "no GPU": ([*where, "--config", recipe, "--device", "cuda"], 2, "--device cpu"),
    }  # fmt: skip


def test_misuse_is_refused_with_the_remedy_and_no_traceback(
    monkeypatch, capsys, tmp_path, images, recipe
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, (arguments, code, message) in misuses(tmp_path, images, recipe).items():
        done = run(monkeypatch, capsys, *arguments)
        assert done.code == code, (name, done.err)
        assert message in done.err, (name, done.err)
        assert "Traceback" not in done.err, name
    assert not (tmp_path / "run" / "model.pt").exists()


def test_a_run_already_there_is_refused_before_the_data_is_read(
    monkeypatch, capsys, tmp_path, images, recipe
):
    out = tmp_path / "run"
    first = run(monkeypatch, capsys, "--data", images, "--out", out, "--config", recipe)
    assert first.code == 0, first.err
    again = run(monkeypatch, capsys, "--data", "no data", "--out", out, "--config", recipe)
    assert (again.code, "--resume" in again.err) == (2, True)
    other = ["--data", "no data", "--out", out, "--resume", "--channels", 16]
    done = run(monkeypatch, capsys, *other)
    assert (done.code, "network.channels = 16" in done.err) == (2, True)


def test_every_field_of_a_recipe_is_a_flag_with_its_default(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "--help").out
    for section in fields(TrainConfig):
        for item in fields(section.default_factory):
            assert f"--{item.name.replace('_', '-')}" in text, item.name
    assert "ddpm-train --data photos/ --out runs/photos --resume\n" in text


def test_help_is_printed_without_loading_torch():
    code = (
        "import sys; sys.argv = ['ddpm-train', '--help']\n"
        "from ddpm_train.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_flags_override_the_recipe_and_the_recipe_the_defaults(recipe):
    flags = {"steps": 99, "flip": None, "channel_multipliers": (1, 2, 4)}
    config = resolve_config(str(recipe), flags)
    assert config.optimization.steps == 99
    assert config.network.channel_multipliers == (1, 2, 4)
    assert config.data.flip is True
    assert config.optimization.accumulation == 1


def test_another_schedule_drops_the_options_of_the_recipes_own(tmp_path):
    body = {"name": "linear", "num_train_timesteps": 40, "beta_end": 0.1}
    path = tmp_path / "recipe.json"
    path.write_bytes(msgspec.json.encode({"diffusion": {"schedule": body}}))
    kept = resolve_config(str(path), {"num_train_timesteps": 30}).diffusion.schedule
    assert kept == {**body, "num_train_timesteps": 30}
    other = resolve_config(str(path), {"schedule": "cosine"}).diffusion.schedule
    assert other == {"name": "cosine", "num_train_timesteps": 40}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_in_the_repository_are_valid_and_survive_a_round_trip(path):
    config = config_from_recipe(path)
    assert config_from_mapping(config.to_dict()) == config


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("value", [0, 2, 4, -1])
def test_images_have_one_or_three_channels(value):
    if value == 0:
        assert tiny_config(data__image_channels=0)
        return
    with pytest.raises(ConfigurationError, match="image_channels"):
        tiny_config(data__image_channels=value)


# --- previews ------------------------------------------------------------------------------------


class KnowsTheImage(torch.nn.Module):
    """The exact noise of x_t for a data set of one grey level a class: an analytic network."""

    def __init__(self, levels: torch.Tensor, alphas_cumprod: np.ndarray) -> None:
        super().__init__()
        self.config = SimpleNamespace(image_channels=1, image_size=4, num_classes=len(levels))
        self.levels = torch.nn.Parameter(levels)
        self.alphas_cumprod = torch.tensor(alphas_cumprod).float()

    def forward(self, x_t, timestep, label):
        alphas_cumprod = self.alphas_cumprod[timestep.long()].reshape(-1, 1, 1, 1)
        x_0 = self.levels[label].reshape(-1, 1, 1, 1)
        return (x_t - alphas_cumprod.sqrt() * x_0) / (1 - alphas_cumprod).sqrt()


def test_previews_show_what_a_perfect_network_knows_class_by_class():
    schedule = make_schedule(num_train_timesteps=50)
    network = KnowsTheImage(torch.tensor([-1.0, 0.0, 0.6]), schedule.alphas_cumprod)
    network.train()
    # the weights that are handed in are used, not the network's own
    weights = {"levels": torch.tensor([-1.0, 0.2, 1.0])}
    images = sample_images(network, weights, schedule, "epsilon", count=70, steps=10)
    assert images.shape == (70, 4, 4, 1)
    expected = np.array([0, 153, 255])[np.arange(70) % 3]  # (x + 1)·127.5
    assert np.abs(images.astype(int) - expected[:, None, None, None]).max() <= 1
    assert network.training


# --- the curve -----------------------------------------------------------------------------------


def test_the_curve_falls_on_the_picture_as_the_loss_falls(tmp_path):
    steps = np.arange(1, 201)
    draw_curve(tmp_path / "curve.png", steps, 1.0 / steps, "a title")
    with Image.open(tmp_path / "curve.png") as image:
        picture = np.asarray(image).astype(int)
    rows, columns = np.nonzero((picture == (31, 90, 160)).all(axis=2))
    left, right = columns < columns.min() + 50, columns > columns.max() - 50
    assert rows[left].mean() < rows[right].mean()  # rows count from the top


@pytest.mark.parametrize("losses", [[], [0.5], [0.5, 0.0]])
def test_a_curve_that_cannot_be_drawn_is_left_out(tmp_path, losses):
    draw_curve(tmp_path / "curve.png", list(range(len(losses))), losses, "")
    assert not (tmp_path / "curve.png").exists()


def test_betas_come_from_a_file_too(tmp_path):
    betas = np.linspace(0.01, 0.2, 25)
    np.save(tmp_path / "betas.npy", betas)
    schedule = resolve_config(None, {"schedule": str(tmp_path / "betas.npy")}).diffusion.schedule
    assert (make_schedule(**schedule).betas == betas).all()
    assert schedule["num_train_timesteps"] == 25
    (tmp_path / "bad.json").write_text("[0.1, 2.0]")
    with pytest.raises(ConfigurationError, match=r"in \(0, 1\)"):
        resolve_config(None, {"schedule": str(tmp_path / "bad.json")})
    with pytest.raises(ConfigurationError, match="no-file"):
        resolve_config(None, {"schedule": str(tmp_path / "no-file.json")})
