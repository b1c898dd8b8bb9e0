"""At which densities tickets win, in the sense of Frankle and Carbin (2019), section 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf.analysis.summary import FLOPS, require_rows
from lth_tf.tasks import METRIC, metric_of, task_of


@dataclasses.dataclass(frozen=True)
class Point:
    """All replicates of one arm at one level; arrays have one entry per replicate.

    `flops` has the means of those columns of `summary.FLOPS` that all replicates know.
    """

    arm: str
    level: int
    density: float
    replicates: tuple[int, ...]
    early_stop_step: np.ndarray
    metric_early: np.ndarray
    metric_end: np.ndarray
    metric: str = METRIC
    flops: Mapping[str, float] = dataclasses.field(default_factory=dict)


Wins = tuple[tuple[float, int], ...]


@dataclasses.dataclass(frozen=True)
class Winning:
    """The densities at which tickets win, the highest first, and how many replicates agree.

    Attributes:
      early: (density, replicates that agree) wherever tickets are winning at early stop.
      end: the same wherever they match dense at the end and re-initialised ones do not.
      replicates: number of replicates.
      compared: number of densities at which there was something to compare.
      margin: of the metric; a smaller difference counts as none.
    """

    early: Wins
    end: Wins
    replicates: int
    compared: int
    margin: float = task_of(METRIC).margin


def points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """Groups summary rows by arm and level, dense first, then by falling density.

    Raises:
      UserError: they are not what `read_summary` returns.
    """
    require_rows(rows, "arm", "level", "replicate")
    metric = metric_of(rows[0] if rows else ())
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["level"]), []).append(row)
    found = []
    for (arm, level), group in groups.items():
        group.sort(key=lambda row: row["replicate"])
        step, early, end = (
            np.array([row[column] for row in group], float)
            for column in ("early_stop_step", f"test_{metric}_early", f"test_{metric}_end")
        )
        density = float(np.mean([row["density"] for row in group]))
        replicates = tuple(row["replicate"] for row in group)
        flops = {
            name: float(np.mean([row[name] for row in group]))
            for name in FLOPS if all(name in row for row in group)
        }  # fmt: skip
        found.append(Point(arm, level, density, replicates, step, early, end, metric, flops))
    return sorted(found, key=lambda p: (p.level, p.arm != "ticket", p.arm))


def wins_early(dense: Any, ticket: Any, reinit: Any, margin: float) -> Any:
    """At early stop: at least dense - margin, at most dense's steps, reinit lower by > margin.

    Args:
      dense, ticket, reinit: each (early-stop step, metric at it, metric at the end), scalars
        or arrays over replicates; of the metric more is better.
      margin: a smaller difference counts as none.
    """
    return (
        (_lead(ticket[1], dense[1]) >= -margin)
        & (ticket[0] <= dense[0])
        & (_lead(ticket[1], reinit[1]) > margin)
    )


def wins_end(dense: Any, ticket: Any, reinit: Any, margin: float) -> Any:
    """At the end: ticket at least dense - margin, reinit below dense - margin.

    Args:
      dense, ticket, reinit, margin: see `wins_early`.
    """
    return (_lead(ticket[2], dense[2]) >= -margin) & (_lead(dense[2], reinit[2]) > margin)


def _lead(a: Any, b: Any) -> Any:
    """a - b, rounded: in binary 0.98 - 0.975 and its like are not quite the margin."""
    return np.round(a - b, 9)


def winning(rows: Sequence[dict[str, Any]]) -> Winning:
    """Returns the densities at which the means over replicates win.

    Only levels at which the `reinit` control ran, and only replicates that have all
    three of dense, ticket and reinit, are compared.
    """
    by = {(p.arm, p.level): p for p in points(rows)}
    dense = by.get(("ticket", 0))
    margin = task_of(next(iter(by.values())).metric if by else METRIC).margin
    compared: list[tuple[float, list[np.ndarray]]] = []
    for (arm, level), ticket in by.items():
        control = by.get(("reinit", level))
        if arm != "ticket" or level == 0 or control is None or dense is None:
            continue
        common = sorted(
            set(dense.replicates) & set(ticket.replicates) & set(control.replicates)
        )
        if common:
            arms = [_numbers(p, common) for p in (dense, ticket, control)]
            compared.append((ticket.density, arms))
    compared.sort(key=lambda one: -one[0])

    def where(wins: Callable[..., Any]) -> Wins:
        return tuple(
            (density, int(np.sum(wins(*arms, margin))))
            for density, arms in compared
            if bool(wins(*(a.mean(axis=1) for a in arms), margin))
        )

    count = len(dense.replicates) if dense else 0
    return Winning(where(wins_early), where(wins_end), count, len(compared), margin)


def _numbers(point: Point, replicates: Sequence[int]) -> np.ndarray:
    """float[3, replicates]: early-stop step, metric there, at the end; of it more is better."""
    chosen = [point.replicates.index(r) for r in replicates]
    sign = 1 if task_of(point.metric).higher else -1
    return np.stack(
        [point.early_stop_step, sign * point.metric_early, sign * point.metric_end]
    )[:, chosen]
