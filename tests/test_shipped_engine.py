"""The engine in the repository: what its checkpoint exports to, repeatable, and what it draws."""

from __future__ import annotations

import numpy as np
import pytest

from ddpm_runtime import Engine
from ddpm_runtime.bundle import read_bundle


@pytest.fixture(scope="module")
def engine(shipped_engine_path):
    with Engine.load(shipped_engine_path) as loaded:
        yield loaded


def test_checkpoint_and_engine_together_stay_within_sixteen_megabytes(shipped_engine_path):
    checkpoint = shipped_engine_path.parent / "fashion-mnist" / "model.pt"
    files = [checkpoint, *shipped_engine_path.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16e6


def test_nothing_in_it_names_a_machine(shipped_engine_path):
    for file in shipped_engine_path.iterdir():
        content = file.read_bytes()
        for trace in (b"/home/", b"/tmp/", b"/Users/", b".py\x00"):
            assert trace not in content, file


@pytest.mark.slow
def test_exporting_the_checkpoint_again_reproduces_the_engine(shipped_engine_path, tmp_path):
    from ddpm_export.pipeline import ExportOptions, bundle_from_checkpoint

    shipped = read_bundle(shipped_engine_path)
    checkpoint = shipped_engine_path.parent / "fashion-mnist" / "model.pt"
    defaults = shipped.manifest.defaults
    options = ExportOptions(
        sampler=defaults.sampler,
        steps=defaults.steps,
        spacing=defaults.spacing,
        guidance_scale=defaults.guidance_scale,
    )
    bundle_from_checkpoint(checkpoint, tmp_path / "again.engine", options=options)
    again = read_bundle(tmp_path / "again.engine")
    assert again.manifest.schedule == shipped.manifest.schedule
    assert again.manifest.network == shipped.manifest.network
    assert again.manifest.image == shipped.manifest.image
    made_with = shipped.manifest.provenance
    if again.manifest.provenance["torch"] == made_with["torch"]:
        assert again.network_bytes == shipped.network_bytes
    else:  # another PyTorch may order the graph differently; the answers must still agree
        images = []
        for path in (shipped_engine_path, tmp_path / "again.engine"):
            with Engine.load(path) as engine:
                images.append(engine.sample(4, steps=10, label="all", output="float32"))
        assert np.abs(images[0] - images[1]).max() < 1e-3


def test_the_parity_report_travels_with_the_engine(engine):
    report = engine.manifest.parity
    assert report["passed"] is True
    assert len(report["evaluations"]) >= 8
    assert (
        max(one["relative_error"] for one in report["evaluations"]) <= report["tolerance"] <= 1e-5
    )
    assert report["rows_identical"] is True


def test_batches_of_every_size_and_order_give_the_same_bits(engine):
    settings = {"steps": 3, "sampler": "ddpm", "output": "float32", "seed": 5}
    labels = [i % 10 for i in range(32)]
    alone = engine.sample(32, **settings, label=labels, guidance_scale=1.5, batch_size=1)
    for batch_size in (2, 3, 5, 8, 16, 31, 32):
        together = engine.sample(
            32, **settings, label=labels, guidance_scale=1.5, batch_size=batch_size
        )
        assert (together == alone).all(), batch_size
    rng = np.random.default_rng(0)
    for _ in range(10):
        start, count = int(rng.integers(0, 24)), int(rng.integers(1, 8))
        part = engine.sample(
            count,
            **settings,
            label=labels[start : start + count],
            guidance_scale=1.5,
            first_index=start,
        )
        assert (part == alone[start : start + count]).all()


def test_one_thread_and_two_give_the_same_bits(shipped_engine_path, engine):
    settings = {"steps": 5, "label": "all", "output": "float32"}
    with Engine.load(shipped_engine_path, threads=1) as single:
        assert (single.sample(8, **settings) == engine.sample(8, **settings)).all()


@pytest.mark.slow
def test_an_independent_judge_recognises_the_garments(engine):
    """A smoke alarm, not the measurement (that is ``ddpm-bench quality``).

    The judge is right on 93 % of real images; a network drawing these classes at half that rate or
    less has been broken. 100 images: 80 % is more than three standard errors below 93 %.
    """
    from ddpm_bench.judge import Judge

    images = engine.sample(100, seed=11, label="all", sampler="dpmpp_2m", steps=20)
    _, logits = Judge.load().features(images)
    right = logits.argmax(axis=1) == np.arange(100) % 10
    assert right.mean() >= 0.8
