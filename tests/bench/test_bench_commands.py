"""ddpm-bench as a person meets it: its tables, its reports, its messages, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner, Result

from ddpm_bench.cli import bench
from ddpm_bench.report import write_json
from ddpm_runtime.errors import ConfigurationError, DataError


def run(*arguments) -> Result:
    done = CliRunner().invoke(bench, [str(word) for word in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def process(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ddpm_bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def quality_run(garment_engine_path, invented_data_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    done = run(
        "quality", "--engine", garment_engine_path, "--data", invented_data_path, "-n", 40,
        "--sampler", "ddim", "--sampler", "ddpm", "--steps", 3, "--steps", 5, "--splits", 2,
        "--seed", 7, "--json", folder / "report.json", "--plot", folder / "curve.png",
    )  # fmt: skip
    return done, folder


def test_quality_measures_every_combination_beside_the_floors(quality_run):
    done, folder = quality_run
    report = json.loads((folder / "report.json").read_text())
    cases = [(case["source"]["sampler"], case["source"]["steps"]) for case in report["cases"]]
    assert cases == [("ddim", 3), ("ddim", 5), ("ddpm", 3), ("ddpm", 5)]
    assert [floor["name"] for floor in report["floors"]] == ["train", "halves"]
    assert all(floor["n"] == 40 for floor in report["floors"])
    for case in report["cases"]:
        assert case["n"] == 40
        assert case["frechet"] > report["floors"][0]["frechet"]  # noise is no rectangle
        assert len(case["accuracy"]["by_class"]) == 10
    for words in ("ddim 3", "ddpm 5", "real images (train, 2 sets", "held out", "Ankle boot"):
        assert words in done.stdout


def test_a_quality_report_says_how_to_make_it_again(quality_run):
    _, folder = quality_run
    report = json.loads((folder / "report.json").read_text())
    assert report["command"].startswith("ddpm-bench quality --engine garments.engine --data ")
    assert "--sampler ddim --sampler ddpm --steps 3 --steps 5" in report["command"]
    assert "--seed 7" in report["command"]
    assert report["seeds"] == {"floors": 0, "kid": 0}
    assert report["cases"][0]["source"]["seed"] == 7
    assert {"numpy", "onnxruntime"} <= set(report["environment"]["libraries"])
    assert report["environment"]["processor"]["usable"] >= 1
    assert len(report["judge"]["sha256"]) == 64


def test_a_report_names_no_folder(quality_run, invented_data_path):
    _, folder = quality_run
    text = (folder / "report.json").read_text()
    assert str(folder) not in text
    assert str(invented_data_path.parent) not in text


def test_quality_is_plotted(quality_run):
    from PIL import Image

    _, folder = quality_run
    with Image.open(folder / "curve.png") as picture:
        assert picture.size[0] > 500


def test_quality_draws_what_the_engine_draws_with_classes_in_turn(
    garment_engine_path, invented_data_path, quality_run, tmp_path
):
    from ddpm_runtime import Engine

    _, folder = quality_run
    with Engine.load(garment_engine_path) as engine:
        images = engine.sample(40, seed=7, sampler="ddim", steps=3, label="all")
    np.savez(tmp_path / "images.npz", images=images, indices=np.arange(40))
    run(
        "quality", "--images", tmp_path / "images.npz", "--classes-in-turn", "--splits", 2,
        "--data", invented_data_path, "--json", tmp_path / "report.json",
    )  # fmt: skip
    found, expected = (
        json.loads((path / "report.json").read_text())["cases"][0] for path in (tmp_path, folder)
    )
    assert {**found, "source": None} == {**expected, "source": None}


def test_images_without_labels_get_distances_and_no_accuracy(invented_data_path, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    done = run("quality", "--images", tmp_path / "images.npz", "--data", invented_data_path)
    assert "not asked" in done.stdout
    assert "by class" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        ([], "exactly one of --engine and --images"),
        (["--engine", "a", "--images", "b"], "exactly one of --engine and --images"),
        (["--images", "b", "--steps", "5"], "--images holds images already drawn"),
        (["--images", "b", "--guidance-scale", "0"], "--images holds images already drawn"),
        (["--images", "b", "-n", "5000"], "--images holds images already drawn"),
        (["--engine", "a", "--classes-in-turn"], "leave it out with --engine"),
        (["--engine", "a", "-n", "1"], "Use 5000"),
        (["--engine", "a", "--splits", "0"], "--splits must be ≥ 1"),
    ],
)
def test_impossible_requests_of_quality_exit_2_with_the_remedy(
    invented_data_path, arguments, remedy
):
    done = run("quality", "--data", invented_data_path, *arguments)
    assert done.exit_code == 2
    assert remedy in done.stderr


def test_quality_refuses_an_engine_the_judge_cannot_look_at(tiny_engine_path, invented_data_path):
    with pytest.raises(ConfigurationError, match="trained on Fashion-MNIST"):
        run("quality", "--engine", tiny_engine_path, "--data", invented_data_path)


def test_quality_refuses_an_impossible_last_case_before_drawing_the_first(
    garment_engine_path, invented_data_path
):
    with pytest.raises(ConfigurationError, match="between 1 and 20"):
        run(
            "quality", "--engine", garment_engine_path, "--data", invented_data_path,
            "--steps", 3, "--steps", 21,
        )  # fmt: skip


def test_quality_refuses_data_without_held_out_images(garment_engine_path, tmp_path):
    np.savez(tmp_path / "some.npz", images=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(ConfigurationError, match="apt-get download"):
        run("quality", "--engine", garment_engine_path, "--data", tmp_path / "some.npz")


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"\x80\x04nonsense"])
def test_quality_refuses_a_file_without_images(invented_data_path, tmp_path, content):
    path = tmp_path / "images.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"ddpm-run --out images\.npz"):
        run("quality", "--images", path, "--data", invented_data_path)


def test_quality_never_unpickles(invented_data_path, tmp_path):
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return open, (str(canary), "w")

    np.savez(tmp_path / "images.npz", images=np.array([Bomb()], dtype=object))
    with pytest.raises(DataError):
        run("quality", "--images", tmp_path / "images.npz", "--data", invented_data_path)
    assert not canary.exists()


def test_a_plot_of_an_unknown_kind_is_refused_before_any_work(garment_engine_path, tmp_path):
    for command in ("quality", "likelihood"):
        with pytest.raises(ConfigurationError, match=r"ends in \.pdf, \.png, \.svg"):
            run(
                command, "--engine", garment_engine_path, "--data", tmp_path / "none",
                "--plot", "curve.bmp",
            )  # fmt: skip


@pytest.mark.parametrize("command", ["quality", "likelihood"])
def test_a_report_that_could_not_be_written_is_refused_before_any_work(
    garment_engine_path, invented_data_path, tmp_path, command
):
    words = [command, "--engine", garment_engine_path, "--data", invented_data_path]
    for option, name in (("--json", "report.json"), ("--plot", "curve.png")):
        with pytest.raises(FileNotFoundError, match="make it first"):
            run(*words, option, tmp_path / "none" / name)
    with pytest.raises(ConfigurationError, match=r"ends in \.json"):
        run(*words, "--json", tmp_path / "report.txt")


def test_likelihood_bounds_both_splits_and_plots_every_term(
    garment_engine_path, invented_data_path, tmp_path
):
    done = run(
        "likelihood", "--engine", garment_engine_path, "--data", invented_data_path, "-n", 6,
        "--json", tmp_path / "report.json", "--plot", tmp_path / "terms.svg",
    )  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert [case["split"] for case in report["cases"]] == ["t10k", "train"]
    for case in report["cases"]:
        assert (case["n"], case["labels"], len(case["terms"])) == (6, True, 20)
        total = case["prior"] + sum(case["terms"])
        assert case["bits_per_dimension"] == pytest.approx(total, rel=1e-9)
        assert f"{case['bits_per_dimension']:.3f}" in done.stdout
    assert "<svg" in (tmp_path / "terms.svg").read_text()


def test_likelihood_takes_unlabelled_arrays_and_fewer_rows(
    garment_engine_path, tmp_path, invented_data_path
):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images)
    done = run(
        "likelihood", "--engine", garment_engine_path, "--data", tmp_path / "images.npz",
        "-n", 5, "--rows-per-image", 3, "--json", tmp_path / "report.json",
    )  # fmt: skip
    (case,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert (case["split"], case["labels"]) == ("all", False)
    assert "all (no labels)" in done.stdout


def test_likelihood_refuses_more_images_than_there_are(garment_engine_path, invented_data_path):
    with pytest.raises(ConfigurationError, match="split 't10k' has 100 images"):
        run("likelihood", "--engine", garment_engine_path, "--data", invented_data_path, "-n", 101)


def test_the_process_speaks_in_exit_codes_and_never_in_tracebacks(tmp_path, invented_data_path):
    wrong = process("quality", "--data", invented_data_path)
    failed = process("likelihood", "--engine", tmp_path, "--data", invented_data_path)
    unknown = process("quantity")
    assert (wrong.returncode, failed.returncode, unknown.returncode) == (2, 1, 2)
    assert "not an engine bundle" in failed.stderr
    for done in (wrong, failed, unknown):
        assert "Traceback" not in done.stderr


def test_a_report_with_nan_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "report.json", {"bits": float("nan")})
    assert not list(tmp_path.iterdir())


def test_measuring_loads_no_pytorch(garment_engine_path, invented_data_path):
    code = (
        "import sys; sys.argv[0] = 'ddpm-bench'\n"
        "from ddpm_bench.cli import bench\n"
        "bench(standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    )
    words = ["--engine", garment_engine_path, "--data", invented_data_path, "-n", "2"]
    for command in (["quality", "--splits", "1"], ["likelihood", "--split", "t10k"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, [*command, *words])],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
