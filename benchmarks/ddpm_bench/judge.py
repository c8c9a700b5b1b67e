"""The judge: a classifier of Fashion-MNIST garments that looks at images (ONNX, no PyTorch).

It was trained on the real training images only, is not part of any generator, and its bytes are
fixed: every score names their SHA-256. How it was made: :mod:`ddpm_bench.judge_train`; how good it
is: the card beside the ONNX file, which :class:`Judge` carries.

    judge = Judge.load()
    features, logits = judge.features(images)       # (N, 128), (N, 10)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddpm_runtime.errors import ConfigurationError, DataError, IntegrityError, missing_extra

__all__ = ["SHIPPED_JUDGE", "Judge"]

SHIPPED_JUDGE = Path(__file__).parent / "fashion_judge.onnx"
IMAGE_SHAPE = (28, 28, 1)

_BATCH = 256  # activations of this many images stay in the caches


class Judge:
    """A loaded judge; make it with :meth:`load`.

    Args:
        session: an onnxruntime session: "images" → "features", "logits".
        card: the JSON card beside the ONNX file.
    """

    def __init__(self, session: Any, card: dict[str, Any]) -> None:
        self._session = session
        self.card = card

    @classmethod
    def load(cls, path: str | os.PathLike[str] = SHIPPED_JUDGE) -> Judge:
        """Load a judge, after checking that its bytes are the ones its card describes.

        Args:
            path: the ONNX file; the card has the same name and ends in ``.json``.

        Raises:
            DataError: the file or its card is missing or malformed.
            IntegrityError: the bytes are not those of the card.
            BackendUnavailableError: onnxruntime is not installed.
        """
        onnx_path = Path(path)
        try:
            card = json.loads(onnx_path.with_suffix(".json").read_bytes())
            promised = card["sha256"]
            onnx_bytes = onnx_path.read_bytes()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"no judge with a readable card at {onnx_path}: {error}. Make one with: python -m "
                "ddpm_bench.judge_train --data FASHION_MNIST --out FILE.onnx"
            ) from error
        found = hashlib.sha256(onnx_bytes).hexdigest()
        if found != promised:
            raise IntegrityError(
                f"the judge {onnx_path.name} has sha256 {found}, its card says {promised}: scores "
                "would compare with nothing. Restore the file from the repository."
            )
        return cls(_open_session(onnx_bytes), card)

    @property
    def sha256(self) -> str:
        """Hash of the ONNX bytes, checked when they were loaded."""
        return str(self.card["sha256"])

    @property
    def classes(self) -> list[str]:
        """Names of the classes, by label."""
        return [str(name) for name in self.card["classes"]]

    def features(
        self,
        images: NDArray[np.uint8],
        *,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Look at images.

        Args:
            images: (N, 28, 28, 1) uint8, N ≥ 1.
            on_progress: called with the number of images just looked at.

        Returns:
            Penultimate features (N, 128) float32, ≥ 0, and logits (N, 10) float32.

        Raises:
            ConfigurationError: another shape or dtype.
        """
        if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or not len(images):
            raise ConfigurationError(
                f"the judge looks at uint8 images of shape (N, 28, 28, 1); got {images.dtype} "
                f"{images.shape}. It knows Fashion-MNIST garments only."
            )
        features, logits = [], []
        for start in range(0, len(images), _BATCH):
            batch = images[start : start + _BATCH]
            seen = self._session.run(["features", "logits"], {"images": batch})
            features.append(seen[0])
            logits.append(seen[1])
            if on_progress is not None:
                on_progress(len(batch))
        return np.concatenate(features), np.concatenate(logits)


def _open_session(onnx_bytes: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_extra("onnxruntime", "run the judge", "bench") from error
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime.InferenceSession(onnx_bytes, providers=["CPUExecutionProvider"])
