"""Table and figure of several methods side by side."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import rich.box
from rich.table import Table

from lth_tf.analysis.comparison import TOTAL, Comparison, deviation, found_small, rows
from lth_tf.analysis.summary import FLOPS
from lth_tf.analysis.winning import Point
from lth_tf.report.figure import density_axis, save
from lth_tf.report.tables import ARMS
from lth_tf.tasks import spoken, task_of

SIMILAR = 0.2  # by how much the sizes of networks in a column differ at most

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {
    "imp": "#0072B2",
    "grasp": "#D55E00",
    "snip": "#009E73",
    "synflow": "#CC79A7",
    "magnitude": "#E69F00",
    "random": "#56B4E9",
}


def comparison_table(found: Comparison) -> Table:
    """Returns the metric at the end: a row per method and arm, a column per density."""
    task = task_of(found.metric)
    unit = ", %" if task.percent else ""
    shown = f"{spoken(found.metric)} at the end{unit}"
    title = f"{found.spec.model} on {found.spec.dataset}: test {shown}"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("method")
    table.add_column("arm")
    for density in found.densities:
        table.add_column(f"{density:.4g}", justify="right", no_wrap=True)
    if found.dense:
        table.add_row("dense", "", *[_cell(found.dense)] * len(found.densities))
    for method, points in found.methods.items():
        table.add_section()
        for arm in dict.fromkeys(p.arm for p in points):
            cells = [_cell(found.at(method, arm, d)) for d in found.densities]
            table.add_row(method if arm == "ticket" else "", ARMS.get(arm, arm), *cells)
    if found.small:
        table.add_section()
    for name, point in found_small(found):
        near = min(found.densities, key=lambda d: abs(math.log(d / point.density)))
        shown = _cell(point) if abs(math.log(near / point.density)) < SIMILAR else ""
        table.add_row(name, "", *[shown if d == near else "" for d in found.densities])
    return table


def flops_table(found: Comparison) -> Table | None:
    """Returns the metric beside the FLOPs of each method's tickets, None where these are unknown.

    FLOPs are those over the dense network's; a ticket of magnitude pruning costs the trainings that
    it comes of, too.
    """
    lines = [
        (found.densities.index(d), method, point)
        for d in found.densities for method in found.methods
        if (point := found.at(method, "ticket", d)) and TOTAL in point.flops
    ]  # fmt: skip
    if not lines:
        return None
    title = f"test {spoken(found.metric)} and FLOPs over those of the dense network"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("density", justify="right")
    table.add_column("method")
    for column in ("inference", "training", "with finding", f"test {spoken(found.metric)}"):
        table.add_column(column, justify="right", no_wrap=True)
    if found.dense:
        table.add_row("", "dense", "1", "1", "1", _cell(found.dense))
    for name, point in found_small(found):
        cost = [f"{point.flops[column]:.3g}" for column in (*FLOPS, TOTAL)]
        table.add_row(f"{point.density:.4g}", name, *cost, _cell(point))
    last = None
    for i, method, point in sorted(lines, key=lambda line: (line[0], line[2].flops[TOTAL])):
        if i != last:
            table.add_section()
        each = [f"{point.flops[name]:.3g}" for name in (*FLOPS, TOTAL)]
        shown = f"{found.densities[i]:.4g}" if i != last else ""
        table.add_row(shown, method, *each, _cell(point))
        last = i
    return table


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    values = point.metric_end * task_of(point.metric).unit[0]
    spread = deviation(values)
    return f"{values.mean():.2f}" + ("" if spread is None else f" ±{spread:.2f}")


def comparison_figure(found: Comparison, path: Path) -> None:
    """Writes a PNG: a panel per arm, a line per method, bands from minimum to maximum.

    Shown are the densities that all methods have, and 25 points of a percentage: networks cut
    down to chance would flatten the rest.
    """
    factor, unit = task_of(found.metric).unit
    arms = list(dict.fromkeys(p.arm for points in found.methods.values() for p in points))
    import matplotlib.figure  # a second, which not every command has to spend

    drawing = matplotlib.figure.Figure(figsize=(1 + 4.5 * len(arms), 4), layout="constrained")
    others = [c for m, c in COLOURS.items() if m not in found.methods] + ["#000000", "#F0E442"]
    unnamed = itertools.cycle(others)  # for variants such as 'grasp (rounds 100)'
    colours = {m: COLOURS.get(m) or next(unnamed) for m in found.methods}
    panels = drawing.subplots(1, len(arms), sharey=True, squeeze=False)[0]
    for ax, arm in zip(panels, arms, strict=True):
        if found.dense:
            level = found.dense.metric_end.mean() * factor
            ax.axhline(level, color="0.4", ls="--", label="dense")
        for method, points in found.methods.items():
            line = [p for p in points if p.arm == arm]
            if not line:
                continue
            x, y = [p.density * 100 for p in line], [p.metric_end * factor for p in line]
            style = {"color": colours[method]}
            ax.plot(x, [v.mean() for v in y], "o-", ms=4, label=method, **style)
            ax.fill_between(x, [v.min() for v in y], [v.max() for v in y], alpha=0.2, lw=0, **style)
        density_axis(ax)
        ax.set_xlim(found.densities[0] * 150, found.densities[-1] * 75)
        if factor == 100:
            top = max(r[f"test_{found.metric}_end"] for r in rows(found)) * factor
            ax.set_ylim(top - 25, top + 1.5)
        ax.set_title("tickets" if arm == "ticket" else ARMS.get(arm, arm))
    panels[0].legend(fontsize="small", loc="lower left")
    panels[0].set_ylabel(f"test {spoken(found.metric)} at the end{unit}")
    drawing.suptitle(f"{found.spec.model} on {found.spec.dataset}")
    save(drawing, path)
