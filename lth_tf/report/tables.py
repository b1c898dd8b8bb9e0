"""Tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from lth_tf.analysis.winning import MARGIN, Point, Winning, points
from lth_tf.experiments import Plan
from lth_tf.scopes import count
from lth_tf.scorers import ROUNDS
from lth_tf.spec import Spec

ARMS = {
    "ticket": "ticket",
    "reinit": "re-initialised",
    "shuffle": "shuffled",
    "invert": "inverted",
    "absolute": "by absolute score",
}


def plan_tables(plan: Plan, spec: Spec, score_only: bool = False) -> Iterator[Any]:
    """Yields the kernels with what becomes of them, then the work in one sentence."""
    table = Table(title=f"{spec.model} on {spec.dataset}: what can be pruned")
    removed = ["removed per level"] if plan.rates else []
    for column in ("kernel", "shape", "weights", *removed, "kept at the last level"):
        table.add_column(column, justify="left" if column in ("kernel", "shape") else "right")
    sizes, last = plan.kept(0), plan.kept(len(plan.densities) - 1)
    if spec.scope == "layerwise":
        last = {n: max(k, min(spec.min_per_layer, sizes[n])) for n, k in last.items()}
        left = sum(last.values())
    else:
        exact = sum((Fraction(d) * sizes[n] for n, d in plan.densities[-1].items()), Fraction())
        left = count(float(exact), 1)
    for name, shape in plan.shapes.items():
        whole = plan.densities[-1][name] == 1 and len(plan.densities) > 1
        rate = [f"{plan.rates[name]:.4g}" if plan.rates[name] else "protected"] if removed else []
        kept = f"{last[name]:,}" if spec.scope == "layerwise" else "all" if whole else "by rank"
        table.add_row(name, " x ".join(map(str, shape)), f"{sizes[name]:,}", *rate, kept)
    total = sum(sizes.values())
    table.add_section()
    table.add_row("all", "", f"{total:,}", *[""] * len(removed), f"{left:,} ({left / total:.2%})")
    yield table
    controls = sum(len(names) for names in plan.controls.values())
    if spec.recipe == "one_shot":
        rounds = spec.rounds or ROUNDS.get(spec.scorer, 1)
        yield (
            f"picked at initialisation by {spec.scorer} in {rounds} round(s), scope {spec.scope}; "
            "densities " + ", ".join(f"{d:.3%}" for d in spec.density)
        )
    elif len(plan.densities) > 1:
        first, end = spec.retrain_span
        yield f"after each pruning: {spec.retrain}, steps {first:,} to {end:,}"
    each = plan.trainings // spec.replicates - controls
    if score_only:
        yield f"{each * spec.replicates} tickets; nothing is trained"
        return
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
    table.add_column("test accuracy there", justify="right")
    table.add_column("test accuracy at the end", justify="right")
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
    return (
        _mean_and_spread(point.early_stop_step, "{:,.0f}"),
        _mean_and_spread(point.test_accuracy_early, "{:.2%}"),
        _mean_and_spread(point.test_accuracy_end, "{:.2%}"),
    )


def sentence(found: Winning) -> str:
    """Says at which densities tickets win, and how many replicates agree; or that none does."""
    if found.early is None and found.end is None:
        return (
            "No winning ticket: at no density with a control were tickets as fast and as accurate "
            f"as the dense network (within {MARGIN:.1%}) and re-initialised ones less accurate by "
            "more than that, at early stop or at the end."
        )
    early, end = (
        f"down to {f[0]:.2%} density ({f[1]} of {found.replicates} replicates agree)"
        if f
        else "at no density"
        for f in (found.early, found.end)
    )
    if found.early is None:
        first = (
            "At early stop tickets are winning at no density: nowhere are they as fast and as "
            "accurate as the dense network where re-initialised ones are not."
        )
    else:
        first = (
            f"Tickets are winning {early}: they reach their minimum validation loss no later than "
            "the dense network and are as accurate there, and re-initialised ones are not."
        )
    return (
        f"{first} At the end of training tickets match the dense network, and re-initialised "
        f"ones do not, {end}."
    )


def bench_table(result: dict[str, Any]) -> Table:
    """Returns a bench's result as a table."""
    if "samples" in result:
        return _score_table(result)
    if "images_per_second" in result:
        return _stream_table(result)
    if "checkpoints" in result:
        return _checkpoints_table(result)
    if "bytes_per_step" in result:
        return _scale_table(result)
    table = Table(title=f"{result['model']} on {result['dataset']}")
    if "steps_per_second" not in result:
        for name in ("seconds", "peak_memory_mb"):
            table.add_column(name, justify="right")
        table.add_row(f"{result['seconds']:.1f}", f"{result['peak_memory_mb']:,.0f}")
        return table
    for column in ("loop", "steps per second", "lth_tf is faster by"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, rate in result["steps_per_second"].items():
        ratio = result.get(f"ratio_{name}")
        shown = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
        table.add_row(name, shown, f"{ratio:.2f}x" if ratio else "")
    return table


def _checkpoints_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']} on {result['dataset']}, {result['steps']:,} steps")
    for column in ("seconds", "checkpoints", "seconds each", "MB each", "share of the time"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['seconds']:.1f}",
        f"{result['checkpoints']}",
        f"{result['seconds_per_checkpoint']:.3f}",
        f"{result['megabytes']:.1f}",
        f"{result['share']:.2%}",
    )
    return table


def _scale_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']} on {result['dataset']}, batch {result['batch_size']}")
    table.add_column("replicas", no_wrap=True)
    for column in ("steps per second", "bytes per step", "packed over plain", "over kept entries"):
        table.add_column(column, justify="right")
    for name, rate in result["steps_per_second"].items():
        packed, density = "packed" in name, name.split()[-1]
        table.add_row(
            name,
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
            f"{result['bytes_per_step'][name]:,}",
            f"{result['ratio_packed'][density]:.2f}x" if packed else "",
            f"{result['payload'][density]:.4f}x" if packed else "",
        )
    return table


def _score_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}, {result['samples']} samples")
    columns = "", "seconds", "of gradient", "peak memory MB", "above the model's", "of gradient"
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    above = result["above_model_mb"]
    unit = max(above["gradient"], 1.0)
    for name, peak in result["peak_memory_mb"].items():
        taken = result["seconds_by_name"].get(name)
        table.add_row(
            name,
            f"{taken:.2f}" if taken else "",
            f"{result['ratio_seconds'][name]:.2f}x" if taken else "",
            f"{peak:,.0f}",
            f"{above[name]:,.0f}",
            f"{above[name] / unit:.2f}x",
        )
    return table


def _stream_table(result: dict[str, Any]) -> Table:
    rates, memory = result["images_per_second"], result["memory_mb"]
    said = (
        "resident memory over the second epoch: {lowest:,.0f} to {highest:,.0f} MB; while the "
        "shuffle buffers are full within {spread:,.0f} MB; growth from epoch to epoch "
        "{growth_per_1000_images:+.2f} MB per 1,000 images"
    )
    about = f"batch {result['batch_size']}; an epoch has {result['images_of_epoch']:,} images"
    table = Table(
        title=f"{result['model']} on {result['dataset']}, {about}",
        caption=said.format(**memory) if memory else "resident memory: unknown on this system",
    )
    for column in ("", "images per second", "of training alone"):
        table.add_column(column, justify="right" if column else "left")
    for name, rate in rates.items():
        ratio = rate / rates["training"]
        if name == "training_streamed":
            ratio = result["ratio_streamed"]
        table.add_row(name, f"{rate:,.0f}", f"{ratio:.2f}x")
    return table
