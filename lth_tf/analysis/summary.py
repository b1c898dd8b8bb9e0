"""From the evaluations of each training to one table of the experiment."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf import storage
from lth_tf.errors import UserError
from lth_tf.tasks import METRIC, metric_of

Row = dict[str, Any]


def columns(metric: str = METRIC) -> tuple[str, ...]:
    """Returns the columns of summary.csv."""
    return (
        "arm", "replicate", "level", "density", "early_stop_step", "validation_loss_min",
        f"test_{metric}_early", f"test_{metric}_end", "steps", "seconds",
    )  # fmt: skip


def early_stop(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the evaluation with the lowest validation loss, the first of equals.

    It is found after training, from all evaluations; nothing is stopped (Frankle and
    Carbin 2019, section 2: the iteration of minimum validation loss).

    >>> early_stop([{"step": 0, "validation_loss": 2.0}, {"step": 9, "validation_loss": 1.0}])
    {'step': 9, 'validation_loss': 1.0}
    """
    return min(rows, key=lambda row: row["validation_loss"])


def summary_row(
    arm: str, replicate: int, level: int, density: float, rows: Sequence[Mapping[str, Any]]
) -> Row:
    """Returns the summary of one training; see `columns`. Density is a fraction.

    Args:
      arm: 'ticket', or the branch that was trained.
      replicate, level: which training.
      density: of its mask, 0 to 1.
      rows: its evaluations, in their order; see `Trained`.
    """
    best, last, metric = early_stop(rows), rows[-1], metric_of(rows[-1])
    return {
        "arm": arm,
        "replicate": replicate,
        "level": level,
        "density": density,
        "early_stop_step": best["step"],
        "validation_loss_min": best["validation_loss"],
        f"test_{metric}_early": best[f"test_{metric}"],
        f"test_{metric}_end": last[f"test_{metric}"],
        "steps": last["step"] - rows[0]["step"],
        "seconds": last["seconds"],
    }


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, floats with all their digits, None as nothing.

    Args:
      path: the file.
      columns: names, in their order.
      rows: name -> value, of every column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write(path, text.getvalue())


def read_csv(path: Path) -> list[Row]:
    """Returns the rows that `write_csv` wrote, numbers as int or float."""

    def value(text: str) -> Any:
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        return text or None

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{str(path)!r} is damaged: a row does not fit its header; delete it")
    return [{k: value(v) for k, v in row.items()} for row in rows]


def write_summary(workdir: Path, rows: Sequence[Row]) -> None:
    """Writes summary.csv and summary.json, sorted by replicate, level and arm."""
    ordered = sorted(
        rows, key=lambda r: (r["replicate"], r["level"], r["arm"] != "ticket", r["arm"])
    )
    metric = metric_of(ordered[0] if ordered else ())
    write_csv(workdir / "summary.csv", columns(metric), ordered)
    storage.write(workdir / "summary.json", json.dumps(ordered, indent=1) + "\n")


def read_summary(workdir: Path) -> list[Row]:
    """Returns the rows of summary.csv; raises UserError where there is none."""
    path = Path(workdir) / "summary.csv"
    if not path.exists():
        raise UserError(f"{str(workdir)!r} has no summary.csv yet: no training has finished there")
    return read_csv(path)
