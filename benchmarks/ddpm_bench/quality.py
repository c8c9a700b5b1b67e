"""How good a set of images is: as the judge sees it, and beside what real images score.

    class accuracy     share of images that the judge takes for the class that was asked
    Fréchet distance   of the judge's features to those of the held-out images
    KID                of the same features
    floors             the same distances for real images, in sets of the same size and classes

A distance without its floor says little: it depends on n and on the judge. Two floors are given.
"train": training images against the held-out images, the score of a perfect generator that had
memorised; the judge saw those images, so it is a touch harsher than real new images would be.
"halves": held-out images against other held-out images, which the judge never saw; both sets are
of one size, at most half of the held-out images.

Sets whose classes are balanced exactly are not independent draws: their KID comes out lower, by the
mean kernel within classes less that between, over n. Generated sets and the "train" floor share
that; the "halves" do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import ConfigurationError

from .data import RealImages, class_counts
from .frechet import GaussianFit, frechet_distance, gaussian_fit
from .judge import Judge
from .kernel_distance import KernelDistance, kernel_distance

__all__ = ["Accuracy", "Floor", "Quality", "Reference", "class_accuracy"]

FLOOR_SEED = 0
KID_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Share of images whose class the judge agrees with.

    Args:
        overall: in [0, 1].
        standard_error: √(p(1 − p)/n).
        by_class: in [0, 1]; None for a class without images.
    """

    overall: float
    standard_error: float
    by_class: list[float | None]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The scores of one set of images."""

    n: int
    frechet: float
    kid: KernelDistance
    accuracy: Accuracy | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What real images score at the same n.

    Args:
        name: "train" or "halves".
        n: images in each set measured.
        against: images in the set measured against.
        splits: how many disjoint sets.
        frechet: mean over splits.
        frechet_deviation: standard deviation over splits; None for one.
        kid: mean over splits.
        kid_deviation: standard deviation over splits; None for one.
    """

    name: str
    n: int
    against: int
    splits: int
    frechet: float
    frechet_deviation: float | None
    kid: float
    kid_deviation: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


class Reference:
    """Held-out images as the judge sees them: looked at once, measured against many times.

    Args:
        judge: looks at every image.
        held_out: images that neither the judge nor the generator was trained on.
        kid_blocks: blocks of every KID.
        on_progress: called with the number of images just looked at.
    """

    def __init__(
        self,
        judge: Judge,
        held_out: RealImages,
        *,
        kid_blocks: int = 50,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._judge = judge
        self._held_out = held_out
        self._kid_blocks = kid_blocks
        self._on_progress = on_progress
        self._features, self._logits = judge.features(held_out.images, on_progress=on_progress)

    @cached_property
    def _fit(self) -> GaussianFit:
        return gaussian_fit(self._features)

    @property
    def n(self) -> int:
        """How many held-out images there are."""
        return len(self._held_out)

    @property
    def judge_accuracy(self) -> Accuracy | None:
        """How often the judge is right on the held-out images; None without labels."""
        if self._held_out.labels is None:
            return None
        return class_accuracy(self._logits, self._held_out.labels)

    def measure(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None = None
    ) -> Quality:
        """Score a set of images.

        Args:
            images: (n, 28, 28, 1) uint8, n ≥ 2.
            labels: (n,) the class each was asked to be, or None.

        Raises:
            ConfigurationError: another shape, or labels that are not one an image.
        """
        features, logits = self._judge.features(images, on_progress=self._on_progress)
        return Quality(
            n=len(images),
            frechet=frechet_distance(gaussian_fit(features), self._fit),
            kid=self._kid(features, self._features),
            accuracy=None if labels is None else class_accuracy(logits, labels),
        )

    def floor_of_training_images(
        self, train: RealImages, counts: Sequence[int], splits: int = 5
    ) -> Floor:
        """Training images, in sets with ``counts`` images of each class, against the held-out.

        Raises:
            ConfigurationError: more images are asked for than there are.
        """
        subsets = train.disjoint_subsets(counts, splits, np.random.default_rng(FLOOR_SEED))
        pairs = []
        for subset in subsets:
            features, _ = self._judge.features(subset.images, on_progress=self._on_progress)
            pairs.append((features, self._features))
        return self._floor("train", pairs)

    def floor_of_halves(self, n: int, splits: int = 5) -> Floor:
        """Held-out images against other held-out images, n of each, or half of them if fewer."""
        rng = np.random.default_rng(FLOOR_SEED)
        size = min(n, len(self._features) // 2)
        pairs = []
        for _ in range(splits):
            order = rng.permutation(len(self._features))
            pairs.append((self._features[order[:size]], self._features[order[size : 2 * size]]))
        return self._floor("halves", pairs)

    def _floor(self, name: str, pairs: list[tuple[Any, Any]]) -> Floor:
        frechet = [frechet_distance(gaussian_fit(a), gaussian_fit(b)) for a, b in pairs]
        kid = [self._kid(a, b).mean for a, b in pairs]
        return Floor(
            name=name,
            n=len(pairs[0][0]),
            against=len(pairs[0][1]),
            splits=len(pairs),
            frechet=float(np.mean(frechet)),
            frechet_deviation=_deviation(frechet),
            kid=float(np.mean(kid)),
            kid_deviation=_deviation(kid),
        )

    def _kid(self, one: NDArray[np.float32], other: NDArray[np.float32]) -> KernelDistance:
        return kernel_distance(one, other, blocks=self._kid_blocks, seed=KID_SEED)


def class_accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Accuracy:
    """How often the largest logit is the class asked for.

    Args:
        logits: (n, K) float32.
        labels: (n,) whole numbers in [0, K).

    Raises:
        ConfigurationError: labels of another length or out of range.
    """
    count, classes = logits.shape
    if labels.shape != (count,) or labels.min() < 0 or labels.max() >= classes:
        raise ConfigurationError(
            f"{count} images need {count} labels from 0 to {classes - 1}; got shape "
            f"{labels.shape} with values {labels.min()} to {labels.max()}."
        )
    right = logits.argmax(axis=1) == labels
    totals = class_counts(labels, count, classes)
    hits = class_counts(labels[right], count, classes)
    overall = float(right.mean())
    return Accuracy(
        overall=overall,
        standard_error=float(np.sqrt(overall * (1.0 - overall) / count)),
        by_class=[hit / total if total else None for hit, total in zip(hits, totals, strict=True)],
    )


def _deviation(values: list[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
