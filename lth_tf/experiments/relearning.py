"""Whether tickets relearn the network that they were pruned from: solutions compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import masks, pruning, storage
from lth_tf.analysis import landscape
from lth_tf.analysis.comparison import method_of, require_alike
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.experiments.looking import lookers
from lth_tf.experiments.workdirs import read_spec
from lth_tf.models import Weights
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec
from lth_tf.tasks import TASKS
from lth_tf.tickets import load_ticket, load_trained, solution

PRUNED = "pruned network"  # the group of those that tickets were cut out of


@dataclasses.dataclass(frozen=True)
class Solution:
    """A training's beginning and end.

    Attributes:
      replicate: which.
      density: of the mask at the end.
      start, end: path -> array.
      pruned: what the ticket was cut out of, under its mask; None: not known.
    """

    replicate: int
    density: float
    start: Weights
    end: Weights
    pruned: Weights | None


@dataclasses.dataclass(frozen=True)
class Relearning:
    """What is known of several groups of solutions.

    Attributes:
      spec: of the first workdir.
      metric: of its task.
      rows: of relearning.csv: a dict per solution.
      lines: of interpolation.csv: a dict per group, replicate, line and point.
      agreement: a dict per pair of groups: disagreement of predictions, mean, deviation, pairs.
      ensembles: group -> (mean of its members' metric, metric of their mean prediction).
    """

    spec: Spec
    metric: str
    rows: list[dict[str, Any]]
    lines: list[dict[str, Any]]
    agreement: list[dict[str, Any]]
    ensembles: dict[str, tuple[float, float]]


def groups(
    workdirs: Sequence[Path], density: float | None = None
) -> tuple[Spec, dict[str, list[Solution]]]:
    """Returns the spec of the first workdir, and the solutions of each group.

    A group is what the replicates of a workdir ended with at one level, tickets and each control by
    themselves. The networks that tickets of iterative pruning were cut out of stand for those of
    other workdirs' replicates with the same number, too.

    Args:
      workdirs: finished experiments, which differ in how masks are found alone.
      density: at which; each workdir's nearest level. None: its last one.

    Raises:
      UserError: they differ in more, one is not finished, or a file is damaged.
    """
    if not workdirs:
        raise UserError("no workdirs given; there must be at least one")
    specs = [read_spec(work) for work in workdirs]
    found: dict[str, list[Solution]] = {}
    pruned: dict[int, Weights] = {}
    short = [RECIPES[spec.recipe].method(spec) for spec in specs]
    whole = list(map(method_of, specs))
    names = short if len(set(short)) == len(set(whole)) else whole
    for work, spec, method in zip(workdirs, specs, names, strict=True):
        require_alike(work, spec, workdirs[0], specs[0])
        level = _level(work, density)
        for arm in ["", *sorted(p.name for p in _folder(work, 0, level).glob("branch_*"))]:
            name = method + (f", {arm.removeprefix('branch_')}" if arm else "")
            if name in found:
                raise UserError(f"{str(work)!r} is a second workdir of {name}; give one of them")
            found[name] = []
            for replicate in range(spec.replicates):
                folder = _folder(work, replicate, level)
                found[name].append(_solution(folder / arm, replicate))
                if RECIPES[spec.recipe].chained and replicate not in pruned:
                    pruned[replicate] = _before(_folder(work, replicate, level - 1), folder)
    if pruned:
        found = {
            name: [dataclasses.replace(s, pruned=pruned.get(s.replicate)) for s in each]
            for name, each in found.items()
        }
    return specs[0], found


def _folder(work: Path, replicate: int, level: int) -> Path:
    return work / f"replicate_{replicate:02d}" / f"level_{level:02d}"


def _level(work: Path, density: float | None) -> int:
    found = {}
    for path in sorted(work.glob("replicate_00/level_*/trained.safetensors")):
        about = storage.read_about(path)
        ticket = storage.read_about(path.with_name("ticket.safetensors"))
        if level := int(about["level"]):
            found[level] = float(about.get("density", ticket["density"]))
    if not found:
        raise UserError(f"{str(work)!r} has no ticket that is trained; run its command to the end")
    if density is None:
        return max(found)
    return min(found, key=lambda level: abs(np.log(found[level] / density)))


def _solution(folder: Path, replicate: int) -> Solution:
    path = folder / "trained.safetensors"
    if not path.exists():
        raise UserError(f"{str(folder)!r} is not trained to the end; run its command again")
    ticket = load_ticket(folder / "ticket.safetensors")
    ended = solution(path, ticket)
    return Solution(replicate, ended.density, dict(ticket.weights), dict(ended.weights), None)


def _before(before: Path, folder: Path) -> Weights:
    """What the training of the level before ended with, under the mask of a ticket."""
    ticket = load_ticket(folder / "ticket.safetensors")
    ended = load_trained(before / "trained.safetensors")
    return masks.apply(ticket.mask, ended)


def relearn(
    spec: Spec, found: dict[str, list[Solution]], dataset: Any, *, examples: int = 5000,
    points: int = 29, say: Callable[[str], None] = lambda text: None,
) -> Relearning:  # fmt: skip
    """Returns distances, losses on lines, disagreement and ensembles of groups of solutions.

    Args:
      spec, found: see `groups`.
      dataset: inputs and labels, in memory.
      examples: of the training part, drawn once, on which losses are taken.
      points: of each line, from -0.2 to 1.2.
      say: told of each group.

    Raises:
      UserError: a data set on disk, or numbers out of range.
    """
    line, test = lookers(spec, dataset, examples, points, 8)
    task = TASKS[dataset.task]
    trained = [n for n, v in pruning.weights(line.model).items() if v.trainable]

    def metric(probabilities: Sequence[np.ndarray]) -> float:
        return test.metric(landscape.ensemble(probabilities))

    rows, lines = [], []
    said: dict[str, list[np.ndarray]] = {}
    pruned: dict[int, np.ndarray] = {}
    for name, members in found.items():
        say(name)
        said[name] = []
        for one in members:
            about = {"group": name, "replicate": one.replicate}
            row = {**about, "density": one.density, **_where(one, trained)}
            for way, barrier, points_of in _lines(one, line, _shares(points)):
                row[f"barrier_{way}"] = barrier
                lines += [{**about, "line": way, **point} for point in points_of]
            mine = _probabilities(test.outputs(one.end))
            said[name].append(mine)
            if one.pruned is not None and one.replicate not in pruned:
                pruned[one.replicate] = _probabilities(test.outputs(one.pruned))
            other = pruned.get(one.replicate)
            apart = None if other is None else landscape.disagreement(mine, other)
            row |= {"disagreement_pruned": apart, f"test_{task.metric}": metric([mine])}
            rows.append(row)
    if pruned:
        said[PRUNED] = list(pruned.values())
    ensembles = {
        name: (float(np.mean([metric([p]) for p in each])), metric(each))
        for name, each in said.items()
    }
    return Relearning(spec, task.metric, rows, lines, _agreement(said), ensembles)


def _where(one: Solution, names: Sequence[str]) -> dict[str, float | None]:
    """Distances and angles, of all that is trained, between start, end and pruned network."""
    vectors = {"start": landscape.flat(one.start, names), "end": landscape.flat(one.end, names)}
    if one.pruned is not None:
        vectors["pruned"] = landscape.flat(one.pruned, names)
    found: dict[str, float | None] = {}
    for a, b in (("start", "end"), ("start", "pruned"), ("end", "pruned")):
        for what in (landscape.distance, landscape.angle):
            known = b in vectors
            found[f"{what.__name__}_{a}_{b}"] = what(vectors[a], vectors[b]) if known else None
    return found


def _lines(
    one: Solution, looker: landscape.Looker, shares: Sequence[float]
) -> Iterator[tuple[str, float | None, list[dict[str, float]]]]:
    """The name of each line, its barrier, and the loss at each share of the way."""
    for way, a, b in (("start_end", one.start, one.end), ("end_pruned", one.end, one.pruned)):
        if b is None:
            yield way, None, []
            continue
        losses = [looker.measured(landscape.between(a, b, share))[0] for share in shares]
        found = [{"share": s, "loss": loss} for s, loss in zip(shares, losses, strict=True)]
        yield way, landscape.barrier(shares, losses), found


def _shares(points: int) -> list[float]:
    """From -0.2 to 1.2 in equal steps, 0 and 1 among them."""
    inner = np.linspace(-0.2, 1.2, points).round(12).tolist()
    return sorted({*inner, 0.0, 1.0})


def _probabilities(outputs: np.ndarray) -> np.ndarray:
    return tf.nn.softmax(tf.constant(outputs)).numpy()


def _agreement(said: dict[str, list[np.ndarray]]) -> list[dict[str, Any]]:
    found = []
    names = list(said)
    for i, a in enumerate(names):
        for b in names[i:]:
            values = [
                landscape.disagreement(*pair) for pair in landscape.pairs(said[a], said[b], a == b)
            ]
            if values:
                found.append({
                    "group": a, "other": b, "pairs": len(values),
                    "disagreement": float(np.mean(values)),
                    "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                })  # fmt: skip
    return found
