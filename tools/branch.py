"""lth-branch: controls run off the tickets of a workdir; tickets not trained yet are, too."""

from lth_tf import edge

with edge.importing():
    import dataclasses

    from absl import flags

    import lth_tf.flags
    from lth_tf import command, experiments
    from lth_tf.errors import UserError
    from lth_tf.experiments.branches import BRANCHES

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the experiment.", required=True)
BRANCH = flags.DEFINE_list(
    "branch", None, f"comma-separated: any of {', '.join(BRANCHES)}.", required=True
)
LEVELS = flags.DEFINE_list("levels", None, "comma-separated (default: its control_levels).")
flags.register_validator("levels", lambda v: all(map(str.isdecimal, v or ())), "whole numbers only")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")


def main() -> None:
    """Adds the branches to the workdir's controls and runs what is not there yet."""
    spec = experiments.read_spec(edge.folder(WORKDIR.value))
    if not BRANCH.value:
        raise UserError(f"--branch= names none; there are: {', '.join(BRANCHES)}")
    for name in BRANCH.value:
        BRANCHES[name]
    controls = tuple(dict.fromkeys([*spec.controls, *BRANCH.value]))
    levels = tuple(map(int, LEVELS.value)) if LEVELS.value else spec.control_levels
    spec = dataclasses.replace(spec, controls=controls, control_levels=levels)
    command.run(spec, DATA_DIR.value, WORKDIR.value)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__)


if __name__ == "__main__":
    run()
