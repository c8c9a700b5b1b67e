"""ddpm_bench/quality.py and data.py: sets of real images, floors and class accuracy."""

from __future__ import annotations

import numpy as np
import pytest
from bench_worlds import PixelJudge

from ddpm_bench.data import RealImages, read_real_images, splits_of
from ddpm_bench.quality import Reference, class_accuracy
from ddpm_runtime.errors import ConfigurationError


def real_images(count: int, seed: int, shift: float = 0.0) -> RealImages:
    """Pixels near mid-grey, ten classes in turn; ``shift`` in grey levels."""
    pixels = np.random.default_rng(seed).normal(128 + shift, 20, (count, 28, 28, 1))
    images = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return RealImages(images=images, labels=np.arange(count) % 10)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(PixelJudge(), real_images(600, seed=0), kid_blocks=5)


def test_subsets_share_no_image_and_have_the_classes_asked():
    real = real_images(500, seed=0)
    counts = [3, 5, 4, 4, 4, 4, 4, 4, 4, 4]
    subsets = real.disjoint_subsets(counts, 4, np.random.default_rng(0))
    seen = [image.tobytes() for subset in subsets for image in subset.images]
    assert len(subsets) == 4
    assert len(seen) == len(set(seen)) == 4 * sum(counts)
    assert all(np.bincount(subset.labels).tolist() == counts for subset in subsets)


def test_fewer_subsets_come_back_when_the_data_runs_out():
    real = real_images(100, seed=0)  # ten of each class
    assert len(real.disjoint_subsets([4] * 10, 5, np.random.default_rng(0))) == 2


def test_more_images_than_there_are_is_refused_with_the_largest_possible_number():
    real = real_images(100, seed=0)
    with pytest.raises(ConfigurationError, match="measure at most 100 images"):
        real.disjoint_subsets([11] * 10, 1, np.random.default_rng(0))


def test_classes_of_unlabelled_data_cannot_be_balanced():
    real = RealImages(images=real_images(20, seed=0).images)
    with pytest.raises(ConfigurationError, match="no labels"):
        real.disjoint_subsets([1] * 10, 1, np.random.default_rng(0))
    assert len(real.disjoint_subsets([7], 2, np.random.default_rng(0))) == 2


def test_the_held_out_images_themselves_are_at_distance_zero(reference):
    quality = reference.measure(real_images(600, seed=0).images)
    assert abs(quality.frechet) < 1e-9


def test_images_from_the_same_law_score_within_the_floors_and_others_far_above(reference):
    train = real_images(2000, seed=1)
    floors = [
        reference.floor_of_training_images(train, [30] * 10, splits=5),
        reference.floor_of_halves(300, splits=5),
    ]
    same = reference.measure(real_images(300, seed=2).images)
    other = reference.measure(real_images(300, seed=3, shift=10).images)
    for floor in floors:
        assert (floor.n, floor.splits) == (300, 5)
        assert floor.frechet / 4 < same.frechet < 4 * floor.frechet
        assert other.frechet > 10 * floor.frechet
        assert other.kid.mean > 10 * abs(floor.kid)


def test_the_floor_of_halves_never_compares_an_image_with_itself(reference):
    floor = reference.floor_of_halves(5000, splits=1)
    assert (floor.n, floor.against, floor.frechet_deviation) == (300, 300, None)


def test_floors_repeat_to_the_last_bit(reference):
    train = real_images(400, seed=4)
    first, again = (reference.floor_of_training_images(train, [20] * 10) for _ in range(2))
    assert first == again


def test_accuracy_counts_overall_and_class_by_class():
    labels = np.array([0, 0, 0, 0, 2, 2])
    logits = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 2, 3]]
    accuracy = class_accuracy(logits, labels)
    assert accuracy.overall == pytest.approx(4 / 6)
    assert accuracy.by_class == [0.75, None, 0.5, None]
    assert accuracy.standard_error == pytest.approx(np.sqrt(4 / 6 * 2 / 6 / 6))


@pytest.mark.parametrize("labels", [[0, 1], [0, 1, 4], [-1, 0, 1]])
def test_labels_that_are_not_one_class_an_image_are_refused(labels):
    with pytest.raises(ConfigurationError, match="3 images need 3 labels from 0 to 3"):
        class_accuracy(np.zeros((3, 4), np.float32), np.array(labels))


def test_the_judges_own_accuracy_needs_labels(reference):
    # PixelJudge always says class 0, which is a tenth of the images
    assert reference.judge_accuracy.overall == pytest.approx(0.1)
    blind = Reference(PixelJudge(), RealImages(images=real_images(20, seed=0).images))
    assert blind.judge_accuracy is None


def test_real_images_come_from_either_split_of_an_idx_folder(invented_data_path):
    assert splits_of(invented_data_path) == ("t10k", "train")
    train = read_real_images(invented_data_path, split="train", size=28, channels=1)
    assert (train.images.shape, train.images.dtype) == ((200, 28, 28, 1), np.uint8)
    assert train.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_an_array_file_has_one_part_only(tmp_path):
    np.savez(tmp_path / "some.npz", images=np.zeros((3, 28, 28), np.uint8))
    assert splits_of(tmp_path / "some.npz") == ("all",)
    with pytest.raises(ConfigurationError, match="unknown split 't10k'; possible: all"):
        read_real_images(tmp_path / "some.npz", split="t10k", size=28, channels=1)
