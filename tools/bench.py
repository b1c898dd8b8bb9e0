"""lth-bench: measured ratios; contenders alternate in one process, medians are reported."""

import json

import rich.console
from absl import flags

import lth_tf.flags
from lth_tf import datasets
from lth_tf.bench import contenders as bench
from lth_tf.bench import stream as bench_stream
from lth_tf.report.tables import bench_table

ROUNDS = flags.DEFINE_integer("rounds", 7, "How often each contender runs.", lower_bound=1)
lth_tf.flags.define_spec("imp", "one_shot")  # after --rounds, which is not the Spec's here
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
BLOCK = flags.DEFINE_integer("block", 500, "Steps per contender and round.", lower_bound=1)
COMMANDS = "train", "start", "scale", "checkpoints", "score", "stream"
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(command: str) -> None:
    """Measures and prints."""
    spec = lth_tf.flags.spec_from_flags("one_shot" if command == "score" else "imp")
    if command == "scale":
        bench.two_replicas(spec)  # before anything is computed
    rounds, data = ROUNDS.value, datasets.load(spec.dataset, DATA_DIR.value)
    result = {
        "train": lambda: bench.train(spec, data, BLOCK.value, rounds),
        "start": lambda: bench.start(spec, DATA_DIR.value, rounds),
        "scale": lambda: bench.scale(spec, data, BLOCK.value, rounds),
        "checkpoints": lambda: bench.checkpoints(spec, data, BLOCK.value, rounds),
        "score": lambda: bench.score(spec, data.input_shape, data.classes, rounds),
        "stream": lambda: bench_stream.stream(spec, data, BLOCK.value, rounds),
    }[command]()
    shown = json.dumps(result) if JSON.value else bench_table(result)
    rich.console.Console(soft_wrap=True).print(shown, highlight=False, markup=False)


def run() -> None:
    """Entry point of the console command."""
    lth_tf.flags.run(main, commands=COMMANDS)


if __name__ == "__main__":
    run()
