"""Keras callbacks, for `lth_tf.training` and for a `model.fit` of one's own."""

from lth_tf.callbacks.best import Best
from lth_tf.callbacks.density import Density
from lth_tf.callbacks.dynamic import GMP, SET, GraNet, RigL
from lth_tf.callbacks.rewind import Rewind
from lth_tf.callbacks.summaries import Summaries

__all__ = ["GMP", "SET", "Best", "Density", "GraNet", "Rewind", "RigL", "Summaries"]
