"""Table and figure of how stable tickets are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from rich.table import Table

from lth_tf.experiments.stability import STABLE
from lth_tf.report.figure import save
from lth_tf.report.relearning import PALETTE
from lth_tf.spec import Spec

Rows = Sequence[Mapping[str, Any]]


def _groups(rows: Rows) -> dict[tuple[int, int], list[Mapping[str, Any]]]:
    """(rewind step, level) -> rows of all replicates, in their order."""
    found: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["rewind_step"], r["level"])):
        found.setdefault((row["rewind_step"], row["level"]), []).append(row)
    return found


def stability_table(rows: Rows, spec: Spec, fraction: bool = True) -> Table:
    """Returns a row for each step and density: instability of error and loss over replicates.

    Args:
      rows: of `stability.instability`.
      spec: of the first workdir.
      fraction: whether errors are shares of examples, of which 2 % is what counts as stable.
    """
    title = f"{spec.model} on {spec.dataset}: instability between two orders of examples"
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    for column in ("from step", "density", "test error", "train error", "test loss", "replicates"):
        table.add_column(column, justify="right")
    table.add_column("")
    for (step, _), each in _groups(rows).items():
        cells = [_mean(each, f"{name}_instability") for name in
                 ("test_error", "train_error", "test_loss")]  # fmt: skip
        density = np.mean([row["density"] for row in each])
        highest = np.mean([row["test_error_instability"] for row in each])
        said = ("stable" if highest < STABLE else "not stable") if fraction else ""
        table.add_row(f"{step:,}", f"{density:.4g}", *cells, str(len(each)), said)
    return table


def _mean(rows: Rows, column: str) -> str:
    values = np.array([row[column] for row in rows])
    spread = f" ±{values.std(ddof=1):.4f}" if len(values) > 1 else ""
    return f"{values.mean():.4f}{spread}"


def stability_figure(rows: Rows, lines: Rows, spec: Spec, path: Path) -> None:
    """Writes a PNG: errors on the lines, and instability against the step or the density.

    Args:
      rows, lines: of `stability.instability`.
      spec: of the first workdir.
      path: the file.
    """
    import matplotlib.figure  # a second, which not every command has to spend

    drawing = matplotlib.figure.Figure(figsize=(10.5, 4), layout="constrained")
    left, right = drawing.subplots(1, 2)
    groups = _groups(rows)
    for i, (step, level) in enumerate(groups):
        mine = [r for r in lines if (r["rewind_step"], r["level"]) == (step, level)]
        shares = sorted({r["share"] for r in mine})
        each = [np.array([r["test_error"] for r in mine if r["share"] == s]) for s in shares]
        style = {"color": PALETTE[i % len(PALETTE)]}
        label = f"from {step:,}, {groups[step, level][0]['density']:.3g}"
        left.plot(shares, [v.mean() for v in each], label=label, **style)
        low, high = [v.min() for v in each], [v.max() for v in each]
        left.fill_between(shares, low, high, alpha=0.2, lw=0, **style)
    left.set_xlabel("from one network (0) to the other (1)")
    left.set_ylabel("test error")
    left.legend(fontsize="small")
    steps = len({step for step, _ in groups}) > 1
    x = [step if steps else each[0]["density"] for (step, _), each in groups.items()]
    for name, marker in (("test", "o"), ("train", "s")):
        y = [[row[f"{name}_error_instability"] for row in each] for each in groups.values()]
        means = [float(np.mean(v)) for v in y]
        ends = [[m - min(v) for m, v in zip(means, y, strict=True)],
                [max(v) - m for m, v in zip(means, y, strict=True)]]  # fmt: skip
        right.errorbar(x, means, ends, fmt=marker, capsize=3, label=name)
    right.axhline(STABLE, color="0.4", ls="--", lw=0.8)
    right.set_xlabel("step that both are trained from" if steps else "density")
    right.set_ylabel("instability of the error")
    right.legend(fontsize="small")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    drawing.suptitle(f"{spec.model} on {spec.dataset}")
    save(drawing, path)
