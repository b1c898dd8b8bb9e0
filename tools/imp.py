"""lth-imp: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from pathlib import Path

import rich.console
from absl import flags

import lth_tf.flags
from lth_tf import datasets, experiment, report
from lth_tf.callbacks.progress import Progress

lth_tf.flags.define_spec("imp")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the experiment writes.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
PLAN = flags.DEFINE_bool("plan", False, "Print what would be done, and stop.")


def main() -> None:
    """Plans, runs and reports."""
    spec, console = lth_tf.flags.spec_from_flags("imp"), rich.console.Console()
    data = datasets.load(spec.dataset, DATA_DIR.value)
    planned = experiment.plan(spec, data.train_images.shape[1:], data.classes)
    for part in report.plan_tables(planned, spec):
        console.print(part, highlight=False)
    if PLAN.value:
        return
    workdir = Path(WORKDIR.value or f"runs/{spec.dataset}_{spec.model}_{spec.digest()}")
    rows = experiment.imp(spec, workdir, data, lambda p: Progress(console, p.steps))
    report.finish(console, rows, workdir, spec)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main)


if __name__ == "__main__":
    run()
