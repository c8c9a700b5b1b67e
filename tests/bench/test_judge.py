"""ddpm_bench/judge.py: the shipped judge is the one its card describes, and sees what it says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from ddpm_bench.data import read_real_images
from ddpm_bench.judge import SHIPPED_JUDGE, Judge
from ddpm_runtime.errors import ConfigurationError, DataError, IntegrityError


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load()


@pytest.fixture
def copied_judge(tmp_path) -> Path:
    for suffix in (".onnx", ".json"):
        shutil.copy(SHIPPED_JUDGE.with_suffix(suffix), tmp_path)
    return tmp_path / SHIPPED_JUDGE.name


def some_images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)


def test_one_altered_byte_is_refused(copied_judge):
    raw = bytearray(copied_judge.read_bytes())
    raw[len(raw) // 2] ^= 1
    copied_judge.write_bytes(raw)
    with pytest.raises(IntegrityError, match="Restore the file"):
        Judge.load(copied_judge)


def test_a_truncated_judge_is_refused(copied_judge):
    copied_judge.write_bytes(copied_judge.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="sha256"):
        Judge.load(copied_judge)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", "not json"])
def test_a_judge_without_a_readable_card_is_refused(copied_judge, content):
    card = copied_judge.with_suffix(".json")
    card.unlink() if content is None else card.write_text(content)
    with pytest.raises(DataError, match="judge_train"):
        Judge.load(copied_judge)


def test_features_and_logits_have_the_promised_shapes(judge):
    features, logits = judge.features(some_images(3))
    assert (features.shape, features.dtype) == ((3, judge.card["features"]), np.float32)
    assert (logits.shape, logits.dtype) == ((3, 10), np.float32)
    assert features.min() >= 0


def test_logits_are_the_last_layer_of_the_features(judge):
    # the weights read straight from the file: penultimate means that nothing is in between
    features, logits = judge.features(some_images(16))
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(SHIPPED_JUDGE).graph.initializer
    }
    expected = features @ weights["classify.weight"].T + weights["classify.bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_image_is_seen_alike_in_any_company(judge):
    images = some_images(600)
    together, _ = judge.features(images)
    alone, _ = judge.features(images[300:301])
    np.testing.assert_allclose(together[300:301], alone, rtol=1e-4, atol=1e-5)


def test_progress_counts_every_image(judge):
    seen = []
    judge.features(some_images(600), on_progress=seen.append)
    assert sum(seen) == 600


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 28, 28, 1), np.float32),
        np.zeros((2, 28, 28), np.uint8),
        np.zeros((2, 32, 32, 1), np.uint8),
        np.zeros((2, 28, 28, 3), np.uint8),
        np.zeros((0, 28, 28, 1), np.uint8),
    ],
)
def test_images_it_was_not_trained_for_are_refused(judge, images):
    with pytest.raises(ConfigurationError, match="Fashion-MNIST garments only"):
        judge.features(images)


def test_the_shipped_files_name_no_folder_of_the_machine_that_made_them():
    for suffix in (".onnx", ".json"):
        content = SHIPPED_JUDGE.with_suffix(suffix).read_bytes()
        for word in (b"/work", b"/home", b"/root", b"/tmp", b"site-packages", b".py"):
            assert word not in content


def test_the_card_describes_the_file_beside_it():
    card = json.loads(SHIPPED_JUDGE.with_suffix(".json").read_text())
    assert card["size_bytes"] == SHIPPED_JUDGE.stat().st_size < 1.6e6
    assert np.mean(list(card["held_out_accuracy_by_class"].values())) == pytest.approx(
        card["held_out_accuracy"], abs=1e-3
    )


@pytest.mark.slow
def test_the_cards_held_out_accuracy_is_measured_again(judge, fashion_mnist_path):
    real = read_real_images(fashion_mnist_path, split="t10k", size=28, channels=1)
    _, logits = judge.features(real.images)
    right = logits.argmax(1) == real.labels
    # another machine may round one borderline image the other way
    assert right.mean() == pytest.approx(judge.card["held_out_accuracy"], abs=3e-4)
    for label, name in enumerate(judge.classes):
        expected = judge.card["held_out_accuracy_by_class"][name]
        assert right[real.labels == label].mean() == pytest.approx(expected, abs=3e-3)
