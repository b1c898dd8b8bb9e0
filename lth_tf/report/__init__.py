"""What a person looks at: the plan, the table of results, one sentence, one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console

from lth_tf.analysis import winning
from lth_tf.report.figure import figure
from lth_tf.report.tables import plan_tables, results_table, sentence
from lth_tf.spec import Spec

__all__ = ["figure", "finish", "plan_tables", "results_table", "sentence"]


def finish(
    console: rich.console.Console, rows: Sequence[dict[str, Any]], workdir: Path, spec: Spec
) -> None:
    """Prints table, sentence and paths of a finished experiment, and draws its figure.

    No sentence where weights are not rewound: such networks go on from trained weights,
    and their steps cannot be compared with those of the dense one.

    Args:
      console: what is printed to.
      rows: of the summary; none after scoring only.
      workdir: the experiment's, which figure.png is written to.
      spec: the experiment.

    Raises:
      UserError: the figure cannot be written.
    """

    def show(text: str) -> None:
        # As it is: a path may be longer than a line and have [brackets].
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    tickets = f"tickets: {workdir}/replicate_*/level_*/ticket.safetensors"
    if not rows:
        show(tickets)
        return
    figure(rows, workdir / "figure.png", f"{spec.model} on {spec.dataset}")
    console.print(results_table(rows), highlight=False)
    if spec.retrain == "rewind" and {("reinit", True), ("ticket", False)} <= {
        (row["arm"], row["level"] > 0) for row in rows
    }:
        console.print(sentence(winning(rows)), highlight=False)
    for name in ("figure.png", "summary.csv"):
        show(str(workdir / name))
    show(f"{tickets}; curves: tensorboard --logdir {workdir}")
