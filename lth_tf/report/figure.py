"""The figure of the ticket paper: early-stop step and accuracies against density."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import storage
from lth_tf.analysis.winning import points
from lth_tf.report.tables import ARMS
from lth_tf.tasks import METRIC, spoken, task_of

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = {
    "ticket": "#0072B2",
    "reinit": "#D55E00",
    "shuffle": "#009E73",
    "invert": "#CC79A7",
    "absolute": "#E69F00",
    "random_erk": "#56B4E9",
    "random_uniform": "#F0E442",
    "random_global": "#000000",
    "reuse": "#999999",
    "reuse_sign": "#666666",
    "sign_only": "#8B4513",
    "other_order": "#4B0082",
}


def _panels(metric: str) -> list[tuple[str, str, float]]:
    """(attribute of points, label, factor) of each panel."""
    factor, unit = task_of(metric).unit
    return [
        ("early_stop_step", "steps to minimum validation loss", 1.0),
        ("metric_early", f"test {spoken(metric)} there{unit}", factor),
        ("metric_end", f"test {spoken(metric)} at the end{unit}", factor),
    ]


def figure(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Writes a PNG: mean over replicates, band from minimum to maximum, dense as dashed line.

    Density falls from left to right on a logarithmic axis (Frankle and Carbin 2019,
    figures 1, 3 and 4).

    Args:
      rows: of the summary.
      path: the file.
      title: what stands above.

    Raises:
      UserError: the file cannot be written.
    """
    found = points(rows)
    import matplotlib.figure  # a second, which not every command has to spend

    drawing = matplotlib.figure.Figure(figsize=(13, 4), layout="constrained")
    panels = _panels(found[0].metric if found else METRIC)
    axes = drawing.subplots(1, len(panels))
    dense = next((p for p in found if p.level == 0), None)
    for ax, (column, label, factor) in zip(axes, panels, strict=True):
        if dense:
            level = getattr(dense, column).mean() * factor
            ax.axhline(level, color="0.4", ls="--", label="dense")
        shown = []
        for arm in dict.fromkeys(p.arm for p in found):
            line = [p for p in found if p.arm == arm]
            x = [p.density * 100 for p in line]
            values = [getattr(p, column) * factor for p in line]
            shown += [float(np.mean(v)) for v in values]
            colour = COLOURS.get(arm)
            ax.plot(
                x, [v.mean() for v in values], "o-", ms=4, color=colour, label=ARMS.get(arm, arm)
            )
            ax.fill_between(
                x, [v.min() for v in values], [v.max() for v in values], color=colour, alpha=0.2,
                lw=0,
            )  # fmt: skip
        density_axis(ax)
        ax.invert_xaxis()
        if factor == 100.0:
            # Networks cut down to chance would flatten all that is of interest.
            top, bottom = max(shown), max(min(shown), max(shown) - 25)
            room = 0.1 * (top - bottom) + 0.2
            ax.set_ylim(bottom - room, top + room)
        ax.set_ylabel(label)
    axes[0].legend()
    drawing.suptitle(title)
    save(drawing, path)


def density_axis(ax: Any) -> None:
    """Makes the horizontal axis one of densities in %, logarithmic."""
    ax.set_xscale("log")
    import matplotlib.ticker

    ax.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.set_xlabel("density (% of weights kept)")
    ax.grid(alpha=0.3)


def save(drawing: Any, path: Path) -> None:
    """Writes a PNG; equal drawings give equal bytes."""
    content = io.BytesIO()
    drawing.savefig(content, format="png", dpi=120, metadata={"Software": None})
    storage.write(path, content.getvalue())
