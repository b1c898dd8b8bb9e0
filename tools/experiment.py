"""An experiment of any recipe as a command; lth-imp and lth-oneshot are such."""

from __future__ import annotations

from collections.abc import Callable

from lth_tf import edge

with edge.importing():
    from absl import flags

    import lth_tf.flags
    from lth_tf import command
    from lth_tf.execution import Execution
    from lth_tf.recipes import RECIPES


def experiment(recipe: str) -> Callable[[], None]:
    """Defines the flags of a recipe; returns the command that plans, runs and reports it."""
    record = RECIPES[recipe]
    lth_tf.flags.define_spec(recipe, **record.defaults)
    workdir = flags.DEFINE_string("workdir", None, "Folder for everything the experiment writes.")
    data_dir = flags.DEFINE_string(
        "data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR)."
    )
    trunk = flags.DEFINE_string("trunk", None, "Workdir whose dense network is the same.")
    jobs, engine, compact, threads = lth_tf.flags.define_execution("jobs")
    live = flags.DEFINE_bool("live", False, "Write TensorBoard logs at each evaluation.")
    plan = flags.DEFINE_bool("plan", False, "Print what would be done, and stop.")
    if record.picks:
        flags.DEFINE_bool("score_only", False, "Write the tickets, and stop.")
    if "levels" in record.fields:
        said = "Train instead of tickets a narrow dense network with this share of the weights."
        flags.DEFINE_float("small_dense", None, said)

    def main() -> None:
        spec = lth_tf.flags.spec_from_flags(recipe)
        options = {
            "plan_only": plan.value, "trunk": trunk.value, "jobs": jobs.value,
            "threads": threads.value,
            "execution": Execution(engine.value, compact.value, live.value),
        }  # fmt: skip
        if record.picks:
            options["score_only"] = flags.FLAGS.score_only
        if "levels" in record.fields:
            options["small_dense"] = flags.FLAGS.small_dense
        command.run(spec, data_dir.value, workdir.value, **options)

    return lambda: lth_tf.flags.run(main, f"{record.tool}: masks from {record.help}.")
