"""lth-bench: measured ratios; contenders alternate in one process, medians are reported."""

from lth_tf import edge

with edge.importing():
    import json
    import sys

    import rich.console
    from absl import flags

    import lth_tf.flags
    from lth_tf.bench import MEASUREMENTS, measure
    from lth_tf.distribute.shares import slow_bfloat16
    from lth_tf.errors import UserError

ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each contender runs.", lower_bound=1)
lth_tf.flags.define_spec("imp", "one_shot", "sparse")  # --rounds is no Spec's here
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
BLOCK = flags.DEFINE_integer("block", 500, "Steps per contender and round.", lower_bound=1)
FIGURE = flags.DEFINE_string("figure", None, "A PNG to draw it into, for lth-bench levels.")
TICKETS = flags.DEFINE_string("tickets", None, "Workdir with tickets to train, for levels.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(command: str) -> None:
    """Measures and prints."""
    which = MEASUREMENTS[command]
    if FIGURE.value is not None and which.figure is None:
        raise UserError(f"--figure: there is nothing to draw of lth-bench {command}")
    picture = None if FIGURE.value is None else edge.path(FIGURE.value, "a figure")
    spec = lth_tf.flags.spec_from_flags(which.recipe)
    if slow := slow_bfloat16(spec.precision):
        print(slow, file=sys.stderr)
    tickets = edge.folder(TICKETS.value) if TICKETS.value else None
    result = measure(which, spec, DATA_DIR.value, BLOCK.value, ROUNDS.value, tickets)
    if picture and which.figure:
        which.figure(result, picture)
    shown = json.dumps(result) if JSON.value else which.table(result)
    rich.console.Console(soft_wrap=True).print(shown, highlight=False, markup=False)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, __doc__, commands=tuple(MEASUREMENTS))


if __name__ == "__main__":
    run()
