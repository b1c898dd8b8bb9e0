"""lth-imp: iterative magnitude pruning with rewinding."""

from __future__ import annotations

from absl import flags

import lth_tf.flags
from lth_tf import command

lth_tf.flags.define_spec("imp")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the experiment writes.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
TRUNK = flags.DEFINE_string("trunk", None, "Workdir whose dense network is the same: is copied.")
PLAN = flags.DEFINE_bool("plan", False, "Print what would be done, and stop.")


def main() -> None:
    """Plans, runs and reports."""
    spec = lth_tf.flags.spec_from_flags("imp")
    options = {"plan_only": PLAN.value, "trunk": TRUNK.value}
    command.run(spec, DATA_DIR.value, WORKDIR.value, **options)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main)


if __name__ == "__main__":
    run()
