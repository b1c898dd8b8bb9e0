"""Tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from lth_tf.analysis.summary import FLOPS
from lth_tf.analysis.winning import Point, Winning, Wins, points
from lth_tf.experiments import Plan, picking
from lth_tf.recipes import RECIPES
from lth_tf.scopes import count
from lth_tf.spec import Spec
from lth_tf.tasks import METRIC, spoken, task_of

ARMS = {
    "ticket": "ticket",
    "reinit": "re-initialised",
    "shuffle": "shuffled",
    "invert": "inverted",
    "absolute": "by absolute score",
    "random_erk": "random, ERK",
    "random_uniform": "random, uniform",
    "random_global": "random",
    "reuse": "values exchanged",
    "reuse_sign": "values exchanged, signs kept",
    "sign_only": "signs alone",
    "other_order": "other order of examples",
}


def plan_tables(plan: Plan, spec: Spec, score_only: bool = False) -> Iterator[Any]:
    """Yields the kernels with what becomes of them, then the work in one sentence.

    Args:
      plan: what `experiments.plan` makes of the spec.
      spec: the experiment.
      score_only: whether tickets are only picked, and nothing is trained.
    """
    table = Table(title=f"{spec.model} on {spec.dataset}: what can be pruned")
    removed = ["removed per level"] if plan.rates else []
    for column in ("kernel", "shape", "weights", *removed, "kept at the last level"):
        table.add_column(column, justify="left" if column in ("kernel", "shape") else "right")
    sizes, last = plan.kept(0), plan.last
    if last:
        left = sum(last.values())
    else:
        exact = sum((Fraction(d) * sizes[n] for n, d in plan.densities[-1].items()), Fraction())
        left = count(float(exact), 1)
    for name, shape in plan.shapes.items():
        whole = plan.densities[-1][name] == 1 and len(plan.densities) > 1
        rate = [f"{plan.rates[name]:.4g}" if plan.rates[name] else "protected"] if removed else []
        kept = f"{last[name]:,}" if last else "all" if whole else "by rank"
        table.add_row(name, " x ".join(map(str, shape)), f"{sizes[name]:,}", *rate, kept)
    total = sum(sizes.values())
    table.add_section()
    table.add_row("all", "", f"{total:,}", *[""] * len(removed), f"{left:,} ({left / total:.2%})")
    yield table
    controls = sum(len(names) for names in plan.controls.values())
    rounds = picking.rounds(spec)
    if said := RECIPES[spec.recipe].says(spec, len(plan.densities) - 1, rounds):
        yield said
    each = plan.trainings // spec.replicates - controls
    if score_only:
        yield f"{each * spec.replicates} tickets; nothing is trained"
        return
    if plan.flops:
        inference, training = (plan.flops[name] for name in FLOPS)
        yield (
            f"FLOPs over those of the dense network at the last level: inference {inference:.3g}, "
            f"training {training:.3g}"
        )
    yield (
        f"{plan.trainings} trainings: {spec.replicates} replicate(s) of {each} "
        f"level(s) and {controls} control(s); {plan.steps:,} steps in all"
    )


def sweep_table(rows: Iterable[Sequence[str]], saved: int) -> Table:
    """Returns the runs of a sweep, see `sweeps.plan_rows`, and how many trainings trunks save."""
    table = Table(caption=f"trunks save {saved} dense training(s)")
    for column in ("run", "what", "dense network", "shard", "status"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _mean_and_spread(values: np.ndarray, form: str) -> str:
    text = form.format(values.mean())
    if len(values) > 1:
        text += " ± " + form.format(values.std(ddof=1)).rstrip("%").strip()
    return text


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns dense, ticket and control at every level where a control ran (else all levels).

    Each cell is the mean over replicates ± the sample standard deviation.
    """
    found = points(rows)
    controlled = {p.level for p in found if p.arm != "ticket"} or {p.level for p in found}
    n = len(found[0].replicates) if found else 0
    table = Table(title=f"mean ± standard deviation over {n} replicate(s)")
    table.add_column("density", justify="right")
    table.add_column("arm")
    table.add_column("steps to minimum validation loss", justify="right")
    metric = found[0].metric if found else METRIC
    table.add_column(f"test {spoken(metric)} there", justify="right")
    table.add_column(f"test {spoken(metric)} at the end", justify="right")
    level = None
    for p in found:
        if p.level not in controlled | {0}:
            continue
        if level is not None and p.level != level:
            table.add_section()
        table.add_row(f"{p.density:.2%}" if p.level != level else "", _arm(p), *_numbers(p))
        level = p.level
    return table


def _arm(point: Point) -> str:
    return "dense" if point.level == 0 else ARMS.get(point.arm, point.arm)


def _numbers(point: Point) -> tuple[str, str, str]:
    form = task_of(point.metric).form
    return (
        _mean_and_spread(point.early_stop_step, "{:,.0f}"),
        _mean_and_spread(point.metric_early, form),
        _mean_and_spread(point.metric_end, form),
    )


def sentence(found: Winning) -> str:
    """Says at which densities tickets win, and how many replicates agree; or that none does."""
    if not found.early and not found.end:
        return (
            "No winning ticket: at no density with a control were tickets as fast and as accurate "
            f"as the dense network (within {found.margin:.1%}) and re-initialised ones less "
            "accurate by more than that, at early stop or at the end."
        )
    of = f"of the {found.compared} densities with a control"
    if found.early:
        first = (
            f"Tickets are winning at {len(found.early)} {of}, {_densities(found.early, found)}: "
            "they reach their minimum validation loss no later than the dense network and are as "
            f"accurate there (within {found.margin:.1%}), and re-initialised ones are not."
        )
    else:
        first = (
            f"At early stop tickets are winning at none {of}: nowhere are they as fast and as "
            "accurate as the dense network where re-initialised ones are not."
        )
    if found.end:
        last = (
            "At the end of training tickets match the dense network, and re-initialised ones do "
            f"not, at {len(found.end)} of them, {_densities(found.end, found)}."
        )
    else:
        last = (
            "At the end of training there is no density at which tickets match the dense network "
            "and re-initialised ones do not."
        )
    return f"{first} {last}"


def _densities(wins: Wins, found: Winning) -> str:
    """'9.04% (2 of 3 replicates agree) and 4.76% (1 of 3)'."""
    of = f"of {found.replicates}"
    agree = [f"{wins[0][1]} {of} replicates agree", *(f"{n} {of}" for _, n in wins[1:])]
    listed = [f"{density:.2%} ({text})" for (density, _), text in zip(wins, agree, strict=True)]
    return " and ".join([", ".join(listed[:-1]), listed[-1]] if listed[1:] else listed)
