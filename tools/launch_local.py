"""launch_local: a command as several workers on this machine, to try out --distribute."""

from __future__ import annotations

import math
import sys

from absl import app, flags

from lth_tf import edge
from lth_tf.distribute import launch
from lth_tf.errors import UserError

WORKERS = flags.DEFINE_integer("workers", 2, "How many workers.", lower_bound=1)
GRACE = flags.DEFINE_float(
    "grace", 60.0, "Seconds until the others are killed when a worker has failed.", lower_bound=0
)


def run() -> None:
    """Entry point; not lth_tf.flags.run, which needs TensorFlow, and refuses a command."""

    def main(argv: list[str]) -> int:
        if argv[1:]:
            raise UserError(f"unexpected {argv[1]!r} before --: there are --workers and --grace")
        if math.isnan(GRACE.value):
            raise UserError("--grace=nan is no number of seconds; give 0 or more")
        return launch.local(command, WORKERS.value, GRACE.value)

    for flag in (WORKERS, GRACE):  # --help shows those of argv[0] only
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    with edge.outer():
        own, command = launch.split(sys.argv)
        app.run(main, argv=own)


if __name__ == "__main__":
    run()
