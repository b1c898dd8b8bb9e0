"""What a run shows: the early-stop step, a summary row per training, winning densities."""

from lth_tf.analysis.paths import collapse, connected
from lth_tf.analysis.summary import early_stop, read_summary, summary_row, write_summary
from lth_tf.analysis.winning import Point, Winning, points, winning

__all__ = [
    "Point",
    "Winning",
    "collapse",
    "connected",
    "early_stop",
    "points",
    "read_summary",
    "summary_row",
    "winning",
    "write_summary",
]
