"""lth-compare: methods side by side, from the workdirs that they ran in."""

from __future__ import annotations

from pathlib import Path

import rich.console
from absl import flags

import lth_tf.flags
from lth_tf import experiments
from lth_tf.analysis import comparison
from lth_tf.analysis.summary import write_csv
from lth_tf.report.comparison import comparison_figure, comparison_table

WORKDIRS = flags.DEFINE_list(
    "workdirs", None, "comma-separated: folders of experiments that differ in how masks are found.",
    required=True,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "Folder for comparison.csv and .png.", required=True)


def main() -> None:
    """Reads, tabulates and draws."""
    found = [(Path(w), experiments.read_spec(Path(w))) for w in WORKDIRS.value]
    result, folder = comparison.compare(found), Path(OUTPUT.value)
    rows = comparison.rows(result)
    write_csv(folder / "comparison.csv", list(rows[0]), rows)
    comparison_figure(result, folder / "comparison.png")
    rich.console.Console().print(comparison_table(result), highlight=False)
    print(folder / "comparison.png")


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main)


if __name__ == "__main__":
    run()
