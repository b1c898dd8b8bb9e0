"""Several workdirs side by side: methods that find masks for the same network and training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf.analysis.summary import read_summary
from lth_tf.analysis.winning import Point, points
from lth_tf.errors import UserError
from lth_tf.spec import Spec

NEAR = 0.02  # relative difference below which two densities are the same row


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Points of several methods.

    Attributes:
      spec: of the first workdir.
      dense: the dense network, or None where no workdir trained it.
      methods: method ('grasp', ..., 'imp') -> its points, dense left out.
      densities: where all methods are, from the highest on.
    """

    spec: Spec
    dense: Point | None
    methods: dict[str, list[Point]]
    densities: list[float]

    def at(self, method: str, arm: str, density: float) -> Point | None:
        """Returns the method's point of that arm at (nearly) that density."""
        for point in self.methods[method]:
            if point.arm == arm and abs(point.density / density - 1) < NEAR:
                return point
        return None


def compare(found: Sequence[tuple[Path, Spec]]) -> Comparison:
    """Returns what workdirs say about the same network, data, training and seeds.

    Args:
      found: (workdir, its spec).

    Raises:
      UserError: they differ in more than how masks are found, two use the same method,
        or one has no finished training.
    """
    first = found[0][1]
    methods: dict[str, list[Point]] = {}
    dense: Point | None = None
    for workdir, spec in found:
        if differing := [n for n in _SHARED if getattr(spec, n) != getattr(first, n)]:
            raise UserError(
                f"{str(workdir)!r} cannot be compared with {str(found[0][0])!r}: they differ in "
                + ", ".join(f"{n} ({getattr(spec, n)}, {getattr(first, n)})" for n in differing)
            )
        method = method_of(spec)
        if method in methods:
            raise UserError(f"{str(workdir)!r} is a second workdir of {method}; give one of them")
        rows = points(read_summary(workdir))
        methods[method] = [p for p in rows if p.level > 0]
        for p in rows:
            if p.level == 0 and (dense is None or len(p.replicates) > len(dense.replicates)):
                dense = p
    fewest = min(methods.values(), key=lambda found: len({p.density for p in found}))
    densities = sorted({round(p.density, 4) for p in fewest if p.arm == "ticket"}, reverse=True)
    return Comparison(first, dense, methods, densities)


def method_of(spec: Spec) -> str:
    """Returns how a spec finds masks, e.g. 'grasp', 'grasp (absolute)', 'imp'."""
    if spec.recipe == "imp":
        return "imp" if spec.retrain == "rewind" else f"imp ({spec.retrain})"
    extras = [
        value
        for value, usual in (
            (getattr(spec, f"{spec.scorer}_variant", "paper"), "paper"),
            (spec.scope, "global"),
            (f"{spec.rounds} rounds", "None rounds"),
        )
        if value != usual
    ]
    return f"{spec.scorer} ({', '.join(extras)})" if extras else spec.scorer


_OWN = {"recipe", "scope", "controls", "control_levels", "replicates", "histograms", "protect"}
_SHARED = [
    f.name
    for f in dataclasses.fields(Spec)
    if f.name not in _OWN and "recipe" not in f.metadata
]


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns a row per method, arm and density: mean and deviation of accuracies, fractions."""
    listed = [("dense", p) for p in [comparison.dense] if p]
    listed += [(name, p) for name, found in comparison.methods.items() for p in found]
    return [
        {
            "method": name,
            "arm": p.arm,
            "density": p.density,
            "replicates": len(p.replicates),
            "test_accuracy_end": float(np.mean(p.test_accuracy_end)),
            "test_accuracy_end_deviation": deviation(p.test_accuracy_end),
            "test_accuracy_early": float(np.mean(p.test_accuracy_early)),
        }
        for name, p in listed
    ]


def deviation(values: np.ndarray) -> float | None:
    """Returns the sample standard deviation, None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
