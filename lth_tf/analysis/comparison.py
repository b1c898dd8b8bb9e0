"""Several workdirs side by side: methods that find masks for the same network and training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import pruning, storage
from lth_tf.analysis import flops
from lth_tf.analysis.summary import FLOPS, read_summary
from lth_tf.analysis.winning import Point, points
from lth_tf.errors import UserError
from lth_tf.models import plain_model
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, fields_of

TRAINING = FLOPS[1]
TOTAL = "total_flops"  # of the training, and of those that the ticket comes of

NEAR = 0.02  # relative difference below which two densities are the same row


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Points of several methods.

    Attributes:
      spec: of the first workdir.
      dense: the dense network, or None where no workdir trained it.
      methods: method ('grasp', ..., 'imp') -> its points, dense left out.
      densities: where all methods have tickets, from the highest on.
      small: small dense networks: name -> their point, whose density is their share of the weights.
    """

    spec: Spec
    dense: Point | None
    methods: dict[str, list[Point]]
    densities: list[float]
    small: dict[str, Point] = dataclasses.field(default_factory=dict)

    @property
    def metric(self) -> str:
        """The metric that is compared."""
        return next(p.metric for points in self.methods.values() for p in points)

    def at(self, method: str, arm: str, density: float) -> Point | None:
        """Returns the method's point of that arm at (nearly) that density, or None.

        Args:
          method: a key of `methods`.
          arm: 'ticket', or a branch.
          density: 0 to 1.
        """
        for point in self.methods[method]:
            if point.arm == arm and _near(point.density, density):
                return point
        return None


def compare(
    found: Sequence[tuple[Path, Spec]], small: Sequence[tuple[Path, Spec]] = ()
) -> Comparison:
    """Returns what workdirs say about the same network, data, training and seeds.

    Args:
      found: (workdir, its spec).
      small: the same of dense networks of other sizes, trained alike.

    Raises:
      UserError: they differ in more than how masks are found, two use the same method,
        one has no finished training, or there is no density that all have.
    """
    if not found:
        raise UserError("no workdirs given; there must be at least one")
    first = found[0][1]
    methods: dict[str, list[Point]] = {}
    dense: Point | None = None
    for workdir, spec in found:
        require_alike(workdir, spec, *found[0])
        method = method_of(spec)
        if method in methods:
            raise UserError(f"{str(workdir)!r} is a second workdir of {method}; give one of them")
        rows = points(read_summary(workdir))
        methods[method] = [_whole(p, rows, spec) for p in rows if p.level > 0]
        for p in rows:
            if p.level == 0 and (dense is None or len(p.replicates) > len(dense.replicates)):
                dense = p
    tickets = [sorted({p.density for p in m if p.arm == "ticket"}) for m in methods.values()]
    common = [
        d
        for d in min(tickets, key=len)
        if all(any(_near(other, d) for other in others) for others in tickets)
    ]
    if not common:
        listed = "; ".join(
            f"{method}: {', '.join(f'{d:.4g}' for d in found)}"
            for method, found in zip(methods, tickets, strict=True)
        )
        raise UserError(f"there is no density at which all have tickets ({listed})")
    others = {}
    for workdir, spec in small:
        require_alike(workdir, spec, *found[0], but=("model", "width"))
        changed = [spec.model] + ([f"width {spec.width:g}"] if spec.width != first.width else [])
        others[f"small dense ({', '.join(changed)})"] = _small(workdir, spec, first)
    return Comparison(first, dense, methods, sorted(common, reverse=True), others)


def require_alike(
    workdir: Path, spec: Spec, other: Path, first: Spec, but: Sequence[str] = ()
) -> None:
    """Raises UserError where two workdirs differ in what, and how, is trained.

    Args:
      workdir, spec: the one.
      other, first: the other, and its spec.
      but: fields that may differ.
    """
    shared = [name for name in fields_of(role="training", grows=False) if name not in but]
    if differing := [n for n in shared if getattr(spec, n) != getattr(first, n)]:
        raise UserError(
            f"{str(workdir)!r} cannot be compared with {str(other)!r}: they differ in "
            + ", ".join(f"{n} ({getattr(spec, n)}, {getattr(first, n)})" for n in differing)
        )


def _small(workdir: Path, spec: Spec, whole: Spec) -> Point:
    """A small network's point, by its weights and FLOPs over those of the whole one."""
    found = [p for p in points(read_summary(workdir)) if p.level == 0]
    if not found:
        raise UserError(
            f"{str(workdir)!r} has no dense network; make one with lth-imp --small_dense"
        )
    ticket = Path(workdir) / "replicate_00" / "level_00" / "ticket.safetensors"
    origin = storage.read_about(ticket)["origin"]
    size, each = [], []
    for one in (spec, whole):
        model = plain_model(one, tuple(origin["input_shape"]), origin["classes"], 0)
        weights = {name: math.prod(v.shape) for name, v in pruning.kernels(model).items()}
        size.append(sum(weights.values()))
        each.append(sum(n * weights[name] for name, n in flops.positions(model).items()))
    cost = each[0] / each[1]
    told = dict.fromkeys((*FLOPS, TOTAL), cost)
    return dataclasses.replace(found[0], density=size[0] / size[1], flops=told)


def _whole(point: Point, points: Sequence[Point], spec: Spec) -> Point:
    """A point that also tells what it cost to find the ticket and to train it."""
    before = [p for p in points if p.arm == "ticket" and p.level < point.level]
    count = [point, *(before if RECIPES[spec.recipe].chained else [])]
    if not all(TRAINING in p.flops for p in count):
        return point
    total = sum(p.flops[TRAINING] for p in count)
    return dataclasses.replace(point, flops={**point.flops, TOTAL: total})


def _near(a: float, b: float) -> bool:
    return abs(a / b - 1) < NEAR


def method_of(spec: Spec) -> str:
    """Returns how a spec finds masks and where that is not the usual: 'grasp (rounds 9)'."""
    scope = RECIPES[spec.recipe].defaults.get("scope", "global")
    usual = Spec(recipe=spec.recipe, scorer=spec.scorer, scope=scope)
    changed = [
        f"{name} {getattr(spec, name)}"
        for name in fields_of(role="masks", grows=False, extent=False)
        if name not in ("recipe", "scorer", "scorer_options", "method")
        and getattr(spec, name) != getattr(usual, name)
    ]
    changed += [f"{option} {value}" for option, value in spec.scorer_options]
    name = RECIPES[spec.recipe].method(spec)
    return f"{name} ({', '.join(changed)})" if changed else name


def rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Returns a row per method, arm and density: mean and deviation of the metric."""
    listed = [("dense", p) for p in [comparison.dense] if p]
    listed += [(name, p) for name, found in comparison.methods.items() for p in found]
    listed += found_small(comparison)
    known = [n for n in (*FLOPS, TOTAL) if any(n in p.flops for _, p in listed)]
    return [
        {
            "method": name,
            "arm": p.arm,
            "density": p.density,
            "replicates": len(p.replicates),
            f"test_{p.metric}_end": float(np.mean(p.metric_end)),
            f"test_{p.metric}_end_deviation": deviation(p.metric_end),
            f"test_{p.metric}_early": float(np.mean(p.metric_early)),
            **{column: p.flops.get(column) for column in known},
        }
        for name, p in listed
    ]


def found_small(comparison: Comparison) -> list[tuple[str, Point]]:
    """Returns the small dense networks, the largest first."""
    return sorted(comparison.small.items(), key=lambda one: -one[1].density)


def deviation(values: np.ndarray) -> float | None:
    """Returns the sample standard deviation, None of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
