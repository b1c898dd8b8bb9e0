"""lth-compare: methods side by side, from the workdirs that they ran in."""

from lth_tf import edge

with edge.importing():
    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf import experiments, storage
    from lth_tf.analysis import comparison
    from lth_tf.analysis.summary import write_csv
    from lth_tf.report.comparison import comparison_figure, comparison_table, flops_table

WORKDIRS = flags.DEFINE_list(
    "workdirs", None, "comma-separated: folders of experiments that differ in how masks are found.",
    required=True,
)  # fmt: skip
SMALL = flags.DEFINE_list(
    "small_dense", [], "comma-separated: folders of lth-imp --small_dense, to stand beside them."
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for comparison.csv and .png.", required=True)


def main() -> None:
    """Reads, tabulates and draws."""
    folder = edge.folder(OUTPUT.value)
    workdirs, small = (
        [(edge.folder(w), experiments.read_spec(edge.folder(w))) for w in each.value]
        for each in (WORKDIRS, SMALL)
    )
    result = comparison.compare(workdirs, small)
    rows = comparison.rows(result)
    with storage.explained(folder, "--output"):
        write_csv(folder / "comparison.csv", list(rows[0]), rows)
        comparison_figure(result, folder / "comparison.png")
    for table in filter(None, (comparison_table(result), flops_table(result))):
        rich.console.Console().print(table, highlight=False)
    print(folder / "comparison.png")


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
