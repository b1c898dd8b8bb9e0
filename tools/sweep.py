"""lth-sweep: a grid of experiments, N at a time or as tasks of an array, with one index."""

from lth_tf import edge

with edge.importing():
    import functools
    import sys

    import rich
    from absl import flags

    import lth_tf.flags
    from lth_tf import sweeps
    from lth_tf.report.tables import sweep_table

PRESETS = flags.DEFINE_list("presets", None, "comma-separated: presets, or paths of flag files.")
SEEDS = flags.DEFINE_list("seeds", None, "comma-separated: values of --seed.")
DENSITIES = flags.DEFINE_list("densities", None, "comma-separated: --density/--target_density.")
SCORERS = flags.DEFINE_list("scorers", None, "comma-separated: values of lth-oneshot's --scorer.")
VARY = flags.DEFINE_multi_string("vary", [], "FLAG=VALUE,VALUE: any other flag; may be repeated.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything.", required=True)
JOBS = flags.DEFINE_integer("jobs", 1, "Runs at a time.", 1)
COMPUTED = lth_tf.flags.define_execution("run_jobs")
SHARD = flags.DEFINE_string("shard", None, "i/n, i from 1: a part of the grid (default: Slurm's).")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
PLAN = flags.DEFINE_bool("plan", False, "Print the grid, and stop.")


def main(passed: list[str]) -> int:
    """Plans and runs."""
    axes = PRESETS.value, SEEDS.value, DENSITIES.value, SCORERS.value, passed, VARY.value
    grid = sweeps.grid(*axes)
    shard, workdir = sweeps.shard_of(SHARD.value), edge.folder(WORKDIR.value)
    if not PLAN.value:
        more = sweeps.execution_words(JOBS.value, *(each.value for each in COMPUTED))
        how = {"jobs": JOBS.value, "shard": shard, "data_dir": DATA_DIR.value, "more": more}
        return sweeps.sweep(grid, workdir, **how)
    rich.print(sweep_table(sweeps.plan_rows(grid, workdir, shard), grid.saved))
    return 0


def run() -> None:
    """Entry point of the console command; what is after -- goes to every run."""
    at = [*sys.argv, "--"].index("--")
    passed, sys.argv = sys.argv[at + 1 :], sys.argv[:at]
    lth_tf.flags.run(functools.partial(main, passed), __doc__)


if __name__ == "__main__":
    run()
