"""lth-bench: measured ratios; contenders alternate in one process, medians are reported."""

from __future__ import annotations

import json

import rich.console
from absl import flags

import lth_tf.flags
from lth_tf import bench, datasets
from lth_tf.report.tables import bench_table

lth_tf.flags.define_spec("imp", "one_shot")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each contender runs.", lower_bound=1)
BLOCK = flags.DEFINE_integer("block", 500, "Steps per contender and round.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(command: str) -> None:
    """Measures and prints."""
    spec = lth_tf.flags.spec_from_flags()
    if command == "train":
        data = datasets.load(spec.dataset, DATA_DIR.value)
        result = bench.train(spec, data, BLOCK.value, ROUNDS.value)
    else:
        result = bench.start(spec, DATA_DIR.value, ROUNDS.value)
    shown = json.dumps(result) if JSON.value else bench_table(result)
    rich.console.Console(soft_wrap=True).print(shown, highlight=False, markup=False)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, commands=("train", "start"))


if __name__ == "__main__":
    run()
