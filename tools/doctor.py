"""lth-doctor: what this machine has, the known troubles that are there, and the fix of each."""

from __future__ import annotations

import sys

from lth_tf import doctor, edge

try:
    from absl import app, flags
except ImportError as missing:
    sys.exit(f"error: {missing}; run: {doctor.pip('absl-py~=1.4')}")

WORKDIR = flags.DEFINE_string("workdir", "runs", "Folder that experiments would write to.")
DATASET = flags.DEFINE_string("dataset", None, "Data set that has to be there.")
DATA_DIR = flags.DEFINE_string("data_dir", None, "tensorflow-datasets folder ($TFDS_DATA_DIR).")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")


def main(argv: list[str]) -> int:
    """Examines and reports."""
    if argv[1:]:
        raise doctor.UserError(f"unexpected {argv[1]!r}: everything is a flag (--name=value)")
    return doctor.report(str(edge.folder(WORKDIR.value)), DATASET.value, DATA_DIR.value, JSON.value)


def run() -> None:
    """Entry point of the console command; not lth_tf.flags.run, which needs TensorFlow."""
    for flag in (WORKDIR, DATASET, DATA_DIR, JSON):  # --help shows those of argv[0] only
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    with edge.outer():
        try:
            app.run(main)
        except Exception as error:  # a traceback would be one more trouble
            known = edge.told(error) or (f"error: {error}", 1)
            sys.exit(known[0])


if __name__ == "__main__":
    run()
