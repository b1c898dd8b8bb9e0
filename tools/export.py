"""lth-export: a ticket's network as files that others can load."""

from __future__ import annotations

from pathlib import Path

from absl import flags

import lth_tf.flags
from lth_tf import datasets, exporters

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
    folder = exporters.find(WORKDIR.value, REPLICATE.value, LEVEL.value, BRANCH.value)
    target = Path(OUTPUT.value or folder / f"export_{FORMAT.value}_{WHAT.value}")
    ticket, trained = exporters.read(folder, WHAT.value)
    data = datasets.load(ticket.spec.dataset, DATA_DIR.value)
    exporters.export(ticket, trained, data, target, FORMAT.value)
    print(exporters.weighed(target, ticket, WORKDIR.value))


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main)


if __name__ == "__main__":
    run()
