"""What the parity gate measured, its verdict, and how it is shown."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ddpm_runtime.errors import ParityError

__all__ = [
    "MAX_IMAGE_DIFFERENCE",
    "MIN_WITHIN_ONE_LEVEL",
    "Evaluation",
    "ParityReport",
    "SampledImages",
]

MAX_IMAGE_DIFFERENCE = 1e-3  # of a final image in [−1, 1]; an 8-bit level is 7.8e-3
MIN_WITHIN_ONE_LEVEL = 0.999  # share of 8-bit values equal or next to each other


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One timestep; every figure is the worst over its rows, in a batch and alone.

    Relative errors are ‖out − reference‖ / ‖reference‖ of one image's prediction.

    Args:
        timestep: what the network was told.
        relative_error: ONNX Runtime against PyTorch float64: what the gate judges.
        relative_error_float32: ONNX Runtime against PyTorch float32.
        pytorch_relative_error: PyTorch float32 against float64: what float32 itself costs.
        max_abs_difference: largest difference of one value from PyTorch float64.
        smallest_answer: smallest ‖reference‖ of a row over √(its size); 0 proves nothing.
        rows_identical: whether every row alone gave the bits that it gave in the batch.
        finite: whether nobody answered NaN or infinity.
    """

    timestep: float
    relative_error: float
    relative_error_float32: float
    pytorch_relative_error: float
    max_abs_difference: float
    smallest_answer: float
    rows_identical: bool
    finite: bool


@dataclass(frozen=True, kw_only=True)
class SampledImages:
    """The same sampler on the same noise, through ONNX Runtime and through PyTorch float32.

    Args:
        sampler: its name.
        steps: rows of its program.
        images: how many were sampled.
        max_abs_difference: of a final value; images lie in [−1, 1].
        within_one_level: share of 8-bit values that differ by at most 1.
        equal: share of 8-bit values that are equal.
        finite: whether no image held NaN or infinity.
    """

    sampler: str
    steps: int
    images: int
    max_abs_difference: float
    within_one_level: float
    equal: float
    finite: bool


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The whole gate.

    Args:
        tolerance: largest relative error allowed.
        batch_size: rows of every evaluation; each row is also evaluated alone.
        labels: labels used, the number of classes standing for "no class"; empty without classes.
        evaluations: from the last timestep to the first, then one between two.
        sampled: final images.
    """

    tolerance: float
    batch_size: int
    labels: tuple[int, ...]
    evaluations: tuple[Evaluation, ...]
    sampled: SampledImages

    @property
    def worst(self) -> Evaluation:
        """The evaluation with the largest relative error; one that is not finite comes first."""
        return max(self.evaluations, key=lambda e: (not e.finite, e.relative_error))

    @property
    def rows_identical(self) -> bool:
        """Whether no row's bits depended on the batch it was in."""
        return all(evaluation.rows_identical for evaluation in self.evaluations)

    @property
    def failures(self) -> list[str]:
        """Why the gate refuses, in words; empty when it passes."""
        worst, sampled = self.worst, self.sampled
        found = []
        if not worst.finite:
            found.append(f"NaN or infinity at timestep {worst.timestep:g}")
        elif min(e.smallest_answer for e in self.evaluations) == 0.0:
            found.append(
                "PyTorch's own answer is exactly zero, so nothing can be compared; an untrained "
                "network does this: train it first"
            )
        elif not worst.relative_error <= self.tolerance:
            found.append(
                f"relative error {worst.relative_error:.2e} at timestep {worst.timestep:g}, "
                f"{self.tolerance:.0e} is allowed (PyTorch float32 itself: "
                f"{worst.pytorch_relative_error:.2e})"
            )
        if not sampled.finite:
            found.append(f"NaN or infinity after {sampled.steps} steps of {sampled.sampler}")
        elif not (
            sampled.max_abs_difference <= MAX_IMAGE_DIFFERENCE
            and sampled.within_one_level >= MIN_WITHIN_ONE_LEVEL
        ):
            found.append(
                f"images of {sampled.steps} {sampled.sampler} steps differ by up to "
                f"{sampled.max_abs_difference:.2e} ({MAX_IMAGE_DIFFERENCE:.0e} is allowed), "
                f"{sampled.within_one_level:.3%} of 8-bit values within one level "
                f"({MIN_WITHIN_ONE_LEVEL:.1%} is required)"
            )
        return found

    @property
    def passed(self) -> bool:
        """The verdict."""
        return not self.failures

    def require(self) -> None:
        """Refuse a network that failed.

        Raises:
            ParityError: with the worst timestep and the figures.
        """
        if self.failures:
            raise ParityError(
                "the exported network does not agree with the PyTorch network: "
                f"{'; '.join(self.failures)}. Nothing was written."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as the manifest keeps them."""
        return {
            "passed": self.passed,
            "rows_identical": self.rows_identical,
            **dataclasses.asdict(self),
            "labels": list(self.labels),
            "evaluations": [dataclasses.asdict(evaluation) for evaluation in self.evaluations],
        }

    def __str__(self) -> str:
        """A table, then the trajectory and the verdict."""
        head = ("timestep", "relative error", "vs float32", "PyTorch's own", "max |difference|")
        lines = ["{:>9}  {:>14}  {:>10}  {:>13}  {:>16}".format(*head)]
        lines += [
            f"{e.timestep:>9g}  {e.relative_error:>14.2e}  {e.relative_error_float32:>10.2e}  "
            f"{e.pytorch_relative_error:>13.2e}  {e.max_abs_difference:>16.2e}"
            for e in self.evaluations
        ]
        sampled = self.sampled
        lines += [
            f"worst relative error {self.worst.relative_error:.2e} at timestep "
            f"{self.worst.timestep:g}; allowed {self.tolerance:.0e}",
            f"a row alone and in a batch of {self.batch_size}: "
            + ("the same bits" if self.rows_identical else "DIFFERENT BITS on this machine"),
            f"{sampled.images} images of {sampled.steps} {sampled.sampler} steps: max |difference| "
            f"{sampled.max_abs_difference:.2e}, 8-bit values {sampled.equal:.3%} equal, "
            f"{sampled.within_one_level:.3%} within one level",
            f"parity: {'passed' if self.passed else 'FAILED'}",
        ]
        return "\n".join(lines)
