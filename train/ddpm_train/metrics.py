"""The numbers of a run: a CSV file, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ddpm_runtime.atomic import atomic_file

__all__ = ["COLUMNS", "MetricsFile", "read_metrics"]

COLUMNS = ("step", "images", "loss", "learning_rate", "gradient_norm", "images_per_second")


class MetricsFile:
    """Appends rows to ``metrics.csv``; every row is on its way to the disk when ``add`` returns.

    Args:
        path: the file.
        resumed_step: rows of later steps are dropped: they will be written again.
        tensorboard: also write TensorBoard events beside the file, where it is installed.
    """

    def __init__(self, path: Path, resumed_step: int = 0, *, tensorboard: bool = True) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= resumed_step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_formatted(row) for row in rows])
        with atomic_file(path) as file:
            file.write(text.getvalue().encode())
        self._file = path.open("a", newline="")
        self._board = _tensorboard(path.parent, resumed_step) if tensorboard else None

    def add(self, row: dict[str, float]) -> None:
        """Append a row with a value for every one of ``COLUMNS``."""
        csv.writer(self._file, lineterminator="\n").writerow(_formatted(row))
        self._file.flush()
        if self._board is not None:
            for name in COLUMNS[2:]:
                self._board.add_scalar(name, row[name], int(row["step"]))

    def close(self) -> None:
        """Close the files; closing twice is fine."""
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics file; [] if there is none. A torn last row is left out."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append({name: float(row[name]) for name in COLUMNS})
            except (KeyError, TypeError, ValueError):
                continue
    return rows


def _formatted(row: dict[str, float]) -> list[str]:
    return [f"{row[name]:.0f}" if name in COLUMNS[:2] else f"{row[name]:.6g}" for name in COLUMNS]


def _tensorboard(folder: Path, resumed_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_step + 1)
