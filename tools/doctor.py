"""lth-doctor: what this machine has, the known troubles that are there, and the fix of each."""

from __future__ import annotations

import json
import sys

from lth_tf import doctor

try:
    from absl import app, flags
except ImportError as missing:
    sys.exit(f"error: {missing}; run: {doctor.pip('absl-py' + doctor.declared('lth_tf')['absl-py'])}")

WORKDIR = flags.DEFINE_string("workdir", "runs", "Folder that experiments would write to.")
DATASET = flags.DEFINE_string("dataset", None, "Data set that has to be there.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv: list[str]) -> int:
    """Examines and reports; returns 1 if there is a problem."""
    if argv[1:]:
        raise doctor.UserError(f"unexpected {argv[1]!r}: everything is a flag (--name=value)")
    report = doctor.examine(WORKDIR.value, DATASET.value, DATA_DIR.value)
    print(json.dumps(report)) if JSON.value else doctor.show(report)
    return int(report["problems"] > 0)


def run() -> None:
    """Entry point of the console command; not lth_tf.flags.run, which needs TensorFlow."""
    try:
        app.run(main)
    except Exception as error:  # never a traceback: the doctor must not be one more trouble
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
