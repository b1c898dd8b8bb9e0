"""lth-oneshot: pruning before training (GraSP, SNIP, SynFlow, magnitude, random)."""

from __future__ import annotations

from absl import flags

import lth_tf.flags
from lth_tf import command

lth_tf.flags.define_spec("one_shot", **lth_tf.flags.DEFAULTS["one_shot"])
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything the experiment writes.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
TRUNK = flags.DEFINE_string("trunk", None, "Workdir whose dense network is the same: is copied.")
PLAN = flags.DEFINE_bool("plan", False, "Print what would be done, and stop.")
SCORE_ONLY = flags.DEFINE_bool("score_only", False, "Write the tickets, and stop.")


def main() -> None:
    """Plans, picks, trains and reports."""
    spec = lth_tf.flags.spec_from_flags("one_shot")
    options = {
        "plan_only": PLAN.value, "score_only": SCORE_ONLY.value, "trunk": TRUNK.value,
    }  # fmt: skip
    command.run(spec, DATA_DIR.value, WORKDIR.value, **options)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main)


if __name__ == "__main__":
    run()
