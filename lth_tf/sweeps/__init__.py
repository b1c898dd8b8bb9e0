"""Sweeps: a grid of experiments as processes of their own, with one index of what came out."""

from lth_tf.sweeps.grid import Grid, Run, grid, shard_of
from lth_tf.sweeps.processes import execution_words, sweep
from lth_tf.sweeps.runs import plan_rows

__all__ = ["Grid", "Run", "execution_words", "grid", "plan_rows", "shard_of", "sweep"]
