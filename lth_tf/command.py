"""What the tools that run experiments share: plan, run, report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import rich.console

from lth_tf import datasets, experiment, report
from lth_tf.callbacks.progress import Progress
from lth_tf.spec import Spec


def run(
    spec: Spec,
    data_dir: str | None,
    workdir: str | None,
    *,
    plan_only: bool = False,
    **options: Any,
) -> None:
    """Prints what a spec asks for, does it, and prints what came out.

    Args:
      spec: the experiment.
      data_dir: folder of the data sets.
      workdir: folder for everything it writes (default: named after the spec, in runs/).
      plan_only: stop after the plan.
      **options: the recipe's, e.g. score_only.
    """
    console, data = rich.console.Console(), datasets.load(spec.dataset, data_dir)
    planned = experiment.plan(spec, data.input_shape, data.classes)
    for part in report.plan_tables(planned, spec, options.get("score_only", False)):
        console.print(part, highlight=False)
    if plan_only:
        return
    work = Path(workdir or f"runs/{spec.dataset}_{spec.model}_{spec.digest()}")
    rows = experiment.RECIPES[spec.recipe](
        spec, work, data, lambda p: Progress(console, p.steps), **options
    )
    report.finish(console, rows, work, spec)
