"""lth-stability: whether two trainings of a ticket in different orders end in one valley."""

from lth_tf import edge

with edge.importing():
    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf import datasets, storage
    from lth_tf.analysis.summary import write_csv
    from lth_tf.experiments import stability
    from lth_tf.report.stability import stability_figure, stability_table
    from lth_tf.tasks import TASKS

WORKDIR = flags.DEFINE_list(
    "workdir", None, "comma-separated: experiments with the control other_order.", required=True
)
OUTPUT = flags.DEFINE_string("output", None, "Folder for tables and figure (default: the first).")
EXAMPLES = flags.DEFINE_integer("examples", 5000, "Training examples for errors.", 1)
POINTS = flags.DEFINE_integer("points", 30, "Points of each line, its ends included.", 3)
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")


def main() -> None:
    """Looks along the lines, writes tables, draws."""
    console, workdirs = rich.console.Console(), [edge.folder(w) for w in WORKDIR.value]
    folder = edge.folder(OUTPUT.value or WORKDIR.value[0])
    spec, found = stability.pairs(workdirs)
    data = datasets.load(spec.dataset, DATA_DIR.value)
    options = {"examples": EXAMPLES.value, "points": POINTS.value, "say": console.print}
    rows, lines = stability.instability(spec, found, data, **options)
    with storage.explained(folder, "--output"):
        write_csv(folder / "stability.csv", list(rows[0]), rows)
        write_csv(folder / "stability_lines.csv", list(lines[0]), lines)
        stability_figure(rows, lines, spec, folder / "stability.png")
    console.print(stability_table(rows, spec, TASKS[data.task].percent), highlight=False)
    print(folder / "stability.png")


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
