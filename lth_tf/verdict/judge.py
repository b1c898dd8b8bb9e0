"""Verdicts on workdirs: which tickets are winning ones, in the sense of Frankle and Carbin (2019).

At a density a ticket is winning where, beside the dense network and the re-initialised control of
its replicate, it is matching (not worse than dense by more than a margin), no later (its minimum of
the validation loss comes at most a tenth later than the dense network's) and special (better than
the control by more than the margin). All of it at early stop; at the end of training it is matching
and special.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf.analysis.comparison import method_of
from lth_tf.analysis.summary import read_summary
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.tasks import metric_of, task_of
from lth_tf.verdict.claims import OPEN, Claim, down_to, settle
from lth_tf.verdict.paired import Evidence, above, no_later
from lth_tf.verdict.planning import replicates_for

RATIO = 1.1
Key = tuple[int, int, str]  # (level, replicate, arm)


@dataclasses.dataclass(frozen=True)
class Margin:
    """By how much two networks may differ and count as alike.

    Attributes:
      value: in the units of the task's metric: 0.005 is half a point of accuracy.
      why: where it comes from.
    """

    value: float
    why: str


# Fixed before any verdict was looked at.
MARGINS = {
    "cifar10": Margin(0.005, "Ma et al. 2021, section 3"),
    "cifar100": Margin(0.01, "Ma et al. 2021, section 3"),
    "tiny_imagenet": Margin(0.01, "Ma et al. 2021, section 3"),
    "imagenet2012": Margin(0.015, "Ma et al. 2021, section 3"),
    "mnist": Margin(0.002, "a tenth of the error of a dense LeNet, 2 %"),
    "fashion_mnist": Margin(0.005, "a twentieth of the error of a dense LeNet-5, 10 %"),
    "digits": Margin(0.01, "four of its 360 test examples"),
    "tiny_shakespeare": Margin(0.02, "what its task calls alike"),
}

EARLY = ("matching", "no later", "special")
END = ("matching at the end", "special at the end")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a workdir's replicates say.

    Attributes:
      spec: of the workdir.
      method: how its masks are found.
      margin: what counts as alike, and why.
      replicates: those that have everything, dense network, tickets and controls.
      early, end: the claims at each density, the highest first, at early stop and at the end.
      beside: of each density what is no part of winning: 'sooner', the minimum comes earlier than
        the dense network's, and for each other control 'better than' it.
      down: densities down to which tickets win at early stop, one after the other.
      wanted: density -> (about, at most) how many replicates would settle an open claim; None:
        more than are counted.
      missing: in words, what a verdict would also need.
    """

    spec: Spec
    method: str
    margin: Margin
    replicates: tuple[int, ...]
    early: list[Claim]
    end: list[Claim]
    beside: list[dict[str, Evidence]]
    down: list[float]
    wanted: Mapping[float, tuple[int | None, int | None]]
    missing: list[str]


def margin_of(spec: Spec, given: float | None) -> Margin:
    """Returns the margin for a spec's data set.

    Args:
      spec: the experiment.
      given: another one; None: that of MARGINS.

    Raises:
      UserError: there is none, or it is no such number.
    """
    if given is not None:
        if not 0 < given < 1:
            raise UserError(f"margin {given:g} is out of range; it must lie between 0 and 1")
        return Margin(given, "given")
    if spec.dataset not in MARGINS:
        raise UserError(
            f"there is no margin for data set {spec.dataset!r}; say with --margin by how much two "
            "networks may differ and count as alike, e.g. --margin=0.005"
        )
    return MARGINS[spec.dataset]


# Test examples of data sets; of others it is not known without reading them.
EXAMPLES = {
    "digits": 360, "mnist": 10_000, "fashion_mnist": 10_000, "cifar10": 10_000, "cifar100": 10_000,
    "tiny_imagenet": 10_000, "imagenet2012": 50_000, "tiny_shakespeare": 871,
}  # fmt: skip


def judge(
    workdir: Path, spec: Spec, *, margin: float | None = None, ratio: float = RATIO,
    control: str = "reinit", alpha: float = 0.05, effect: float | None = None,
) -> Verdict:  # fmt: skip
    """Returns the verdict on a workdir.

    Args:
      workdir: an experiment with a dense network and controls.
      spec: the experiment.
      margin: see `margin_of`.
      ratio: how many times later a minimum may come and count as no later.
      control: the branch that tickets have to be better than.
      alpha: one-sided, of what is shown and of what is refuted.
      effect: by how much tickets are taken to be better than the control, over the margin, where
        numbers of replicates are named; by default the margin once more.

    Raises:
      UserError: there is nothing to compare, or no margin.
    """
    alike = margin_of(spec, margin)
    rows = {(r["level"], r["replicate"], r["arm"]): r for r in read_summary(workdir)}
    levels = sorted({level for level, _, arm in rows if level and arm == control})
    missing = _missing(rows, spec, levels, control)
    if not levels:
        have = sorted({arm for _, _, arm in rows} - {"ticket"})
        raise UserError(
            f"{str(workdir)!r} has no control {control!r}"
            + (f", only {', '.join(have)}" if have else "")
            + f": run lth-branch --workdir={workdir} --branch={control}"
        )
    if not any(level == 0 for level, _, _ in rows):
        raise UserError(
            f"{str(workdir)!r} has no dense network to compare with; run its command with --dense"
        )
    early, end, beside, whole = [], [], [], set()
    metric = metric_of(next(iter(rows.values())))
    others = sorted({arm for _, _, arm in rows} - {"ticket", control})
    for level in levels:
        have = [
            r for r in range(spec.replicates)
            if all(k in rows for k in ((0, r, "ticket"), (level, r, "ticket"), (level, r, control)))
        ]  # fmt: skip
        whole |= set(have)
        dense, ticket, other = (
            [rows[key(r)] for r in have]
            for key in (
                lambda r: (0, r, "ticket"),
                lambda r, level=level: (level, r, "ticket"),
                lambda r, level=level: (level, r, control),
            )
        )
        if ticket:
            density = sum(row["density"] for row in ticket) / len(ticket)
            pair = _claims(density, dense, ticket, other, spec, alike.value, ratio, alpha)
            early.append(pair[0])
            end.append(pair[1])
            told = {"sooner": no_later(*_steps(ticket, dense, spec), 1.0, alpha=alpha)}
            for arm in others:
                those = [r for r in have if (level, r, arm) in rows]
                a, b = ([rows[level, r, which] for r in those] for which in ("ticket", arm))
                if those:
                    d = _apart(a, b, f"test_{metric}_end")
                    told[f"better than {arm} at the end"] = above(d, alike.value, alpha)
            beside.append(told)
    early, end = settle(early, alpha), settle(end, alpha)
    down = [claim.density for claim in down_to(early, alpha)]
    gap = alike.value if effect is None else effect
    wanted = {
        claim.density: _wanted(claim, alike.value, gap, ratio, alpha / len(early))
        for claim in early if claim.answer == OPEN
    }  # fmt: skip
    return Verdict(
        spec, method_of(spec), alike, tuple(sorted(whole)), early, end, beside, down, wanted,
        missing,
    )


def _missing(
    rows: Mapping[Key, Any], spec: Spec, levels: Sequence[int], control: str
) -> list[str]:
    found = []
    for replicate in range(spec.replicates):
        wanted = [(0, "ticket"), *((level, arm) for level in levels for arm in ("ticket", control))]
        lacks = [f"level {n} {arm}" for n, arm in wanted if (n, replicate, arm) not in rows]
        if lacks:
            found.append(f"replicate {replicate} lacks {', '.join(lacks)}")
    return found


def _claims(
    density: float, dense: list, ticket: list, other: list, spec: Spec, margin: float, ratio: float,
    alpha: float,
) -> tuple[Claim, Claim]:  # fmt: skip
    at_early, at_end = (f"test_{metric_of(ticket[0])}_{at}" for at in ("early", "end"))
    mine, others, late, dense_late = _steps(ticket, dense, spec)
    early = {
        "matching": above(_apart(ticket, dense, at_early), -margin, alpha),
        "no later": no_later(mine, others, late, dense_late, ratio, alpha=alpha),
        "special": above(_apart(ticket, other, at_early), margin, alpha),
    }
    end = {
        "matching at the end": above(_apart(ticket, dense, at_end), -margin, alpha),
        "special at the end": above(_apart(ticket, other, at_end), margin, alpha),
    }
    return Claim(density, early), Claim(density, end)


def _apart(a: list, b: list, column: str) -> list[float]:
    """By how much each row of `a` is better than that of `b`."""
    sign = 1.0 if task_of(metric_of([column])).higher else -1.0
    return [sign * (x[column] - y[column]) for x, y in zip(a, b, strict=True)]


def _steps(ticket: list, dense: list, spec: Spec) -> tuple[list, list, list, list]:
    """Steps of the minima, and whether each lies at the last evaluation."""
    mine, others = ([row["early_stop_step"] for row in each] for each in (ticket, dense))
    late = [s >= spec.retrain_span[1] for s in mine]
    return mine, others, late, [s >= spec.train_steps for s in others]


def _wanted(
    claim: Claim, margin: float, gap: float, ratio: float, level: float
) -> tuple[int | None, int | None]:
    """Numbers of replicates, at stated true differences: 0 for matching, `gap` for special."""
    away = {"matching": margin, "no later": math.log(ratio), "special": gap}
    known = {name: part for name, part in claim.parts.items() if part.spread == part.spread}
    n = min((part.n for part in known.values()), default=0)
    if n < 2:
        return None, None
    spreads = {name: part.spread for name, part in known.items()}
    return replicates_for({name: away[name] for name in known}, spreads, n, level)
