"""What is measured on a training's way, in files beside its metrics.csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf.analysis import summary
from lth_tf.callbacks.moving import UPDATE

UPDATES = "updates.csv"  # a row per update of the mask, see `moving.Mover`
HESSIAN = "hessian.csv"  # eigenvalues, see `spectrum.Spectrum`


def write_updates(folder: Path, updates: Sequence[Mapping[str, float]]) -> None:
    """Writes updates.csv.

    Args:
      folder: of the training.
      updates: as a `moving.Mover` tells them.
    """
    measured = {name for row in updates for name in row}
    summary.write_csv(folder / UPDATES, [n for n in UPDATE if n in measured], updates)


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns the rows of UPDATES or of HESSIAN, none where nothing was measured.

    Args:
      folder: of the training.
      name: which.

    Raises:
      UserError: the file is damaged.
    """
    path = Path(folder) / name
    return summary.read_csv(path) if path.exists() else []


def logged(folder: Path, first: int, last: int) -> list[tuple[int, dict[str, float]]]:
    """Returns what TensorBoard is told of these files: (step, name -> number).

    Args:
      folder: of the training.
      first, last: the steps from which and to which.
    """
    found = [
        (row["step"], {f"mask/{n}": v for n, v in row.items() if n != "step" and v is not None})
        for row in read(folder, UPDATES)
    ]
    found += [
        (row["step"], {f"hessian/eigenvalue_{row['rank']}": row["eigenvalue"]})
        for row in read(folder, HESSIAN)
    ]
    return [(step, numbers) for step, numbers in found if first <= step <= last]


def clear(folder: Path) -> None:
    """Deletes these files: a training begins anew."""
    for name in (UPDATES, HESSIAN):
        (Path(folder) / name).unlink(missing_ok=True)
