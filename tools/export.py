"""lth-export: a ticket's network as files that others can load."""

from lth_tf import edge

with edge.importing():
    from absl import flags

    import lth_tf.flags
    from lth_tf import datasets, exporters
    from lth_tf.errors import UserError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment.", required=True)
REPLICATE = flags.DEFINE_integer("replicate", 0, "Which replicate.")
LEVEL = flags.DEFINE_integer("level", None, "Which level; 0 is dense.", required=True)
BRANCH = flags.DEFINE_string("branch", None, "A control run off that level, e.g. reinit.")
FORMAT = flags.DEFINE_string("format", "saved_model", f"One of: {', '.join(exporters.EXPORTERS)}.")
flags.register_validator("format", exporters.EXPORTERS.__getitem__)
WHAT = flags.DEFINE_enum("what", "trained", ("trained", "ticket"), "Trained or start weights.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to make (default: in the level's folder).")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")


def main() -> None:
    """Finds, exports and weighs."""
    if BRANCH.value == "":
        raise UserError("--branch= names none; give one, or leave it out for the level's ticket")
    work = edge.folder(WORKDIR.value)
    folder = exporters.find(work, REPLICATE.value, LEVEL.value, BRANCH.value)
    own = folder / f"export_{FORMAT.value}_{WHAT.value}"
    target = own if OUTPUT.value is None else edge.folder(OUTPUT.value)
    ticket, trained = exporters.read(folder, WHAT.value)
    data = datasets.load(ticket.spec.dataset, DATA_DIR.value)
    exporters.export(ticket, trained, data, target, FORMAT.value)
    print(exporters.weighed(target, ticket, work))


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
