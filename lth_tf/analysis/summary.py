"""From the evaluations of each training to one table of the experiment."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf import edge, storage
from lth_tf.errors import UserError
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec
from lth_tf.tasks import METRIC, metric_of
from lth_tf.tickets import require_metrics, told, whose
from lth_tf.training import states

Row = dict[str, Any]


# FLOPs over those of the dense network, see `flops`; trainings of before they were counted lack
# them.
FLOPS = ("inference_flops", "training_flops")


def columns(metric: str = METRIC, given: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the columns of summary.csv.

    Args:
      metric: the task's.
      given: names among which are those of FLOPS that it has.
    """
    return (
        "arm", "replicate", "level", "density", "early_stop_step", "validation_loss_min",
        f"test_{metric}_early", f"test_{metric}_end", "steps", "seconds",
        *(name for name in FLOPS if name in given),
    )  # fmt: skip


def require_rows(rows: Any, *names: str) -> None:
    """Raises UserError unless something is a list of dicts that have these keys."""
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(f"rows are a list of dicts, as they are read, not {type(rows).__name__}")
    for row in rows:
        if missing := [name for name in names if name not in row]:
            listed = ", ".join(map(str, row))
            raise UserError(f"a row has no {' and no '.join(missing)}, only {listed}")


def early_stop(rows: Sequence[Mapping[str, Any]], settled: int = 0) -> Mapping[str, Any]:
    """Returns the evaluation with the lowest validation loss, the first of equals.

    It is found after training, from all evaluations; nothing is stopped (Frankle and
    Carbin 2019, section 2: the iteration of minimum validation loss).

    Args:
      rows: the evaluations.
      settled: the step from which on they count, for a network that was denser before.

    >>> early_stop([{"step": 0, "validation_loss": 2.0}, {"step": 9, "validation_loss": 1.0}])
    {'step': 9, 'validation_loss': 1.0}
    """
    require_rows(rows, "validation_loss")
    count = [row for row in rows if row["step"] >= settled] or rows[-1:]
    return min(count, key=lambda row: row["validation_loss"])


def summary_row(
    arm: str, replicate: int, level: int, density: float, rows: Sequence[Mapping[str, Any]],
    settled: int = 0, flops: Mapping[str, float] | None = None,
) -> Row:  # fmt: skip
    """Returns the summary of one training; see `columns`. Density is a fraction.

    Args:
      arm: 'ticket', or the branch that was trained.
      replicate, level: which training.
      density: of its mask, 0 to 1.
      rows: its evaluations, in their order; see `Trained`.
      settled: see `early_stop`.
      flops: of FLOPS what is known.
    """
    best, last, metric = early_stop(rows, settled), rows[-1], metric_of(rows[-1])
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
        **(flops or {}),
    }


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, floats with all their digits, None as nothing.

    Args:
      path: the file.
      columns: names, in their order.
      rows: name -> value, of every column.
    """
    storage.write(path, _text(columns, rows))


def _text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_csv(path: Path) -> list[Row]:
    """Returns the rows that `write_csv` wrote, numbers as int or float."""
    with storage.reading(path, "is damaged", "delete it"):
        return _table(Path(path).read_text(encoding="utf-8"))[1]


def _table(text: str) -> tuple[list[str], list[Row]]:
    """The header and the rows of a text; raises ValueError where they do not fit."""

    def value(text: str) -> Any:
        if text.isascii() and "_" not in text and text == text.strip():
            for kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    pass
        return text or None

    header, *lines = [*csv.reader(io.StringIO(text, newline=""), strict=True)] or [[]]
    storage.require(len(set(header)) == len(header), "a column is there twice")
    storage.require(all(len(line) == len(header) for line in lines), "a row has other columns")
    return header, [dict(zip(header, map(value, line), strict=True)) for line in lines]


def write_metrics(path: Path, metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Writes the evaluations of a training; returns their digest.

    Args:
      path: metrics.csv.
      metric: the task's.
      rows: see `Trained`.
    """
    text = _text(states.columns(metric, rows[0] if rows else ()), rows)
    storage.write(path, text)
    return _digest(text)


def _digest(text: str) -> str:
    """A sha256 of a metrics.csv but for its seconds, in which equal trainings differ."""
    header, *lines = [*csv.reader(io.StringIO(text, newline=""))]
    left_out = header.index("seconds")
    rest = [line[:left_out] + line[left_out + 1 :] for line in (header, *lines)]
    return hashlib.sha256(json.dumps(rest).encode()).hexdigest()


def read_metrics(path: Path) -> tuple[list[Row], str]:
    """Returns what `write_metrics` wrote: the evaluations, and their digest.

    Raises:
      UserError: the file is absent, damaged or holds something else.
    """
    remedy = "delete it and run the same command again: the training is done again"
    with storage.reading(path, "is damaged", remedy):
        text = Path(path).read_text(encoding="utf-8")
        header, rows = _table(text)
        states.require_rows(rows)
        storage.require(header == states.columns(metric_of(header), header), "other columns")
        return rows, _digest(text)


def write_summary(workdir: Path, rows: Sequence[Row]) -> None:
    """Writes summary.csv and summary.json, sorted by replicate, level and arm."""
    ordered = sorted(
        rows, key=lambda r: (r["replicate"], r["level"], r["arm"] != "ticket", r["arm"])
    )
    metric = metric_of(ordered[0] if ordered else ())
    known = {name for row in ordered for name in row}
    write_csv(workdir / "summary.csv", columns(metric, known), ordered)
    storage.write(workdir / "summary.json", json.dumps(ordered, indent=1) + "\n")


def read_summary(workdir: Path) -> list[Row]:
    """Returns the rows of summary.csv.

    Raises:
      UserError: there is none, it is damaged, or says something else than the trainings that lie
        beside it.
    """
    workdir = edge.folder(workdir)
    path, rows = workdir / "summary.csv", written(workdir)
    if strange := contradicting(workdir, rows):
        raise UserError(
            f"{str(path)!r} does not say what the trainings beside it say ({strange}); delete it "
            "and run the experiment's command again: it is made anew of their metrics.csv"
        )
    return rows


def written(workdir: Path) -> list[Row]:
    """Returns the rows of summary.csv as they are; raises UserError as `read_summary`."""
    path = Path(workdir) / "summary.csv"
    if not path.exists():
        raise UserError(f"{str(workdir)!r} has no summary.csv yet: no training has finished there")
    remedy = "delete it and run the experiment's command again: it is made anew"
    with storage.reading(path, "is damaged", remedy):
        header, rows = _table(path.read_text(encoding="utf-8"))
        storage.require(header == list(columns(metric_of(header), header)), "other columns")
        for row in rows:
            arm = isinstance(row["arm"], str) and re.fullmatch(r"\w[\w.-]*", row["arm"])
            storage.require(arm, "a row without an arm")
            for name in ("replicate", "level", "early_stop_step", "steps"):
                storage.require(storage.is_count(row[name]), f"a {name} that is no count")
            fits = type(row["density"]) in (int, float) and 0 <= row["density"] <= 1
            storage.require(fits, "a density that is no fraction")
            for name in header[5:]:
                fits = type(row[name]) in (int, float) or (name in FLOPS and row[name] is None)
                storage.require(fits, f"a {name} that is no number")
        keys = {(row["arm"], row["replicate"], row["level"]) for row in rows}
        storage.require(len(keys) == len(rows), "a training is there twice")
        return [{n: v for n, v in row.items() if n not in FLOPS or v is not None} for row in rows]


def rebuilt(workdir: Path) -> list[Row]:
    """Returns what summary.csv has to say: a row for each training that is finished.

    Raises:
      UserError: a file that it is made of is damaged, or another training's.
    """
    done = sorted(Path(workdir).glob("replicate_*/level_*/**/trained.safetensors"))
    return [row for path in done if (row := _row(path.parent))]


def contradicting(workdir: Path, rows: Sequence[Row]) -> str:
    """Returns in words which rows say something else than the trainings of a workdir.

    '' where there are none, or where no trainings lie there: a summary can be published alone.
    """
    work, found = Path(workdir), []
    for row in rows if any(work.glob("replicate_*")) else ():
        level = work / f"replicate_{row['replicate']:02d}" / f"level_{row['level']:02d}"
        folder = level if row["arm"] == "ticket" else level / f"branch_{row['arm']}"
        what = f"replicate {row['replicate']} level {row['level']} {row['arm']}"
        if not (folder / "metrics.csv").exists():
            found.append(f"{what}: no such training is finished")
            continue
        own = _row(folder)
        if own is None:  # its weights may have been deleted since
            key = row["arm"], row["replicate"], row["level"]
            there = folder / "ticket.safetensors"
            settled = _settled(storage.read_about(there)) if there.exists() else 0
            evaluations, _ = read_metrics(folder / "metrics.csv")
            flops = {name: row[name] for name in FLOPS if name in row}
            own = summary_row(*key, row["density"], evaluations, settled, flops)
        if own != row:
            names = [name for name in {**own, **row} if own.get(name) != row.get(name)]
            found.append(f"{what}: another {names[0] if names else 'column'}")
    return "; ".join(found[:3]) + (f"; {len(found) - 3} more" if len(found) > 3 else "")


def _row(folder: Path) -> Row | None:
    """The row of the training in a folder; None where it is not finished."""
    ticket, metrics = folder / "ticket.safetensors", folder / "metrics.csv"
    trained, which = folder / "trained.safetensors", whose(folder)
    if not which or not all(path.exists() for path in (ticket, metrics, trained)):
        return None
    rows, digest = read_metrics(metrics)
    about = {path: storage.read_about(path) for path in (ticket, trained)}
    for path, said in about.items():
        with storage.reading(path, "is damaged", "delete it and run the same command again"):
            storage.require_meant(path, told(said["level"], said["origin"]), which)
    require_metrics(trained, about[trained], digest)
    density = about[trained].get("density", about[ticket].get("density", -1))  # it may have moved
    with storage.reading(ticket, "is no whole ticket", "delete it and run the same command again"):
        fits = type(density) in (int, float) and 0 <= density <= 1
        storage.require(fits, "a density that is no fraction")
    settled = _settled(about[ticket])
    key, flops = (which["arm"], which["replicate"], which["level"]), flops_of(about[trained])
    return summary_row(*key, density, rows, settled, flops)


def flops_of(about: Mapping[str, Any]) -> dict[str, float]:
    """Returns what the metadata of trained weights tell of FLOPs."""
    told = about.get("flops")
    found = told if isinstance(told, Mapping) else {}
    return {name: found[name] for name in FLOPS if storage.is_number(found.get(name))}


def _settled(about: Mapping[str, Any]) -> int:
    """The step from which on evaluations count, of what a ticket's file tells."""
    spec = Spec.from_dict(about["spec"])
    return RECIPES[spec.recipe].settled(spec) if about["level"] else 0
