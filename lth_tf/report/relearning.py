"""Tables and figure of solutions compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.table import Table

from lth_tf.experiments.relearning import Relearning
from lth_tf.report.figure import save
from lth_tf.tasks import spoken, task_of

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
_LINES = {
    "density": "density",
    "distance_start_pruned": "distance of the start",
    "distance_end_pruned": "distance of the end",
    "angle_start_pruned": "angle of the start (degrees)",
    "angle_end_pruned": "angle of the end (degrees)",
    "barrier_end_pruned": "loss barrier from the end",
    "disagreement_pruned": "predictions that differ (%)",
    "distance_start_end": "distance from start to end",
    "barrier_start_end": "loss barrier from start to end",
}


def relearning_tables(found: Relearning) -> Iterator[Table]:
    """Yields where each group's solutions lie, then how far their predictions agree."""
    task, names = task_of(found.metric), list(dict.fromkeys(row["group"] for row in found.rows))
    known = any(row["distance_end_pruned"] is not None for row in found.rows)
    title = f"{found.spec.model} on {found.spec.dataset}: where solutions lie"
    if not known:
        title += "; no workdir tells what tickets were pruned from"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("to the pruned network" if known else "")
    for name in names:
        table.add_column(name, justify="right")
    for column, label in _LINES.items():
        if all(row[column] is None for row in found.rows):
            continue
        if column == "distance_start_end":
            table.add_section()
        factor = 100 if "(%)" in label else 1
        values = {name: [r[column] for r in found.rows if r["group"] == name] for name in names}
        table.add_row(label, *[_mean(each, factor) for each in values.values()])
    table.add_section()
    for i, label in enumerate((f"test {spoken(found.metric)}", "the same of an ensemble")):
        table.add_row(label, *[task.form.format(found.ensembles[name][i]) for name in names])
    yield table
    if not (names := _named(found)):
        return
    table = Table(title="test predictions that differ (%)", box=rich.box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for i, name in enumerate(names):
        table.add_row(name, *[""] * i, *[_share(found, name, other) for other in names[i:]])
    yield table


def _mean(values: Sequence[float | None], factor: float) -> str:
    known = [v * factor for v in values if v is not None]
    if not known:
        return ""
    spread = f" ±{np.std(known, ddof=1):.2g}" if len(known) > 1 else ""
    return f"{np.mean(known):.3g}{spread}"


def _share(found: Relearning, one: str, other: str) -> str:
    for row in found.agreement:
        if (row["group"], row["other"]) == (one, other):
            spread = "" if row["deviation"] is None else f" ±{100 * row['deviation']:.2f}"
            return f"{100 * row['disagreement']:.2f}{spread}"
    return ""


def _named(found: Relearning) -> list[str]:
    """The groups that agree or not, in their order."""
    each = found.agreement
    return list(dict.fromkeys([row["group"] for row in each] + [row["other"] for row in each]))


def relearning_figure(found: Relearning, path: Path) -> None:
    """Writes a PNG: losses from start to end, from end to the pruned network, and disagreement."""
    import matplotlib.figure  # a second, which not every command has to spend

    groups = list(dict.fromkeys(row["group"] for row in found.rows))
    colours = dict(zip(groups, PALETTE * (1 + len(groups) // len(PALETTE)), strict=False))
    ways = [w for w in ("start_end", "end_pruned") if any(r["line"] == w for r in found.lines)]
    drawing = matplotlib.figure.Figure(
        figsize=(4.5 * (len(ways) + 1) + 1, 4.2), layout="constrained"
    )
    panels = drawing.subplots(1, len(ways) + 1, squeeze=False)[0]
    labels = {
        "start_end": "from start (0) to end (1)",
        "end_pruned": "from end (0) to the pruned network (1)",
    }
    for ax, way in zip(panels, ways, strict=False):
        for group in groups:
            mine = [r for r in found.lines if (r["group"], r["line"]) == (group, way)]
            shares = sorted({r["share"] for r in mine})
            each = [np.array([r["loss"] for r in mine if r["share"] == s]) for s in shares]
            if each:
                style = {"color": colours[group]}
                ax.plot(shares, [v.mean() for v in each], label=_short(group), **style)
                low, high = [v.min() for v in each], [v.max() for v in each]
                ax.fill_between(shares, low, high, alpha=0.2, lw=0, **style)
        ax.set_yscale("log")
        ax.set_xlabel(labels[way])
        ax.set_ylabel("training loss")
        ax.grid(alpha=0.3)
        for at in (0, 1):
            ax.axvline(at, color="0.7", lw=0.8, zorder=0)
    panels[0].legend(fontsize="small")
    _matrix(panels[-1], found)
    drawing.suptitle(f"{found.spec.model} on {found.spec.dataset}")
    save(drawing, path)


def _short(name: str) -> str:
    """What of a name a figure has room for."""
    return name if len(name) <= 24 else f"{name[:23]}\u2026"


def _matrix(ax: Any, found: Relearning) -> None:
    names = _named(found)
    values = np.full((len(names), len(names)), np.nan)
    for row in found.agreement:
        i, j = names.index(row["group"]), names.index(row["other"])
        values[i, j] = values[j, i] = 100 * row["disagreement"]
    ax.imshow(values, cmap="Blues", vmin=0)
    top = np.nanmax(values) if names else 0
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = "white" if value > top / 2 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=dark, fontsize="small")
    shown = list(map(_short, names))
    ax.set_xticks(range(len(names)), shown, rotation=30, ha="right", fontsize="small")
    ax.set_yticks(range(len(names)), shown, fontsize="small")
    ax.set_title("test predictions that differ (%)", fontsize="medium")
