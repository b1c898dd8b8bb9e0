"""lth-relearn: whether tickets relearn the network that they were pruned from."""

from lth_tf import edge

with edge.importing():
    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf import datasets, storage
    from lth_tf.analysis.summary import write_csv
    from lth_tf.experiments import relearning
    from lth_tf.report.relearning import relearning_figure, relearning_tables

WORKDIR = flags.DEFINE_list(
    "workdir", None, "comma-separated: finished experiments that differ in how masks are found.",
    required=True,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "Folder for tables and figure (default: the first).")
DENSITY = flags.DEFINE_float("density", None, "Whose level of each (default: the last).", 0, 1)
EXAMPLES = flags.DEFINE_integer("examples", 5000, "Training examples for losses.", 1)
POINTS = flags.DEFINE_integer("points", 29, "Points of each line, from -0.2 to 1.2.", 8)
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")


def main() -> None:
    """Compares, writes tables, draws."""
    workdirs, console = [edge.folder(w) for w in WORKDIR.value], rich.console.Console()
    folder = edge.folder(OUTPUT.value or WORKDIR.value[0])
    spec, groups = relearning.groups(workdirs, DENSITY.value)
    data = datasets.load(spec.dataset, DATA_DIR.value)
    options = {"examples": EXAMPLES.value, "points": POINTS.value, "say": console.print}
    found = relearning.relearn(spec, groups, data, **options)
    each = {"relearning": found.rows, "interpolation": found.lines, "disagreement": found.agreement}
    with storage.explained(folder, "--output"):
        for name, rows in each.items():
            write_csv(folder / f"{name}.csv", list(rows[0]) if rows else ["group"], rows)
        relearning_figure(found, folder / "relearning.png")
    for table in relearning_tables(found):
        console.print(table, highlight=False)
    print(folder / "relearning.png")


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
