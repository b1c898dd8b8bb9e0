"""Dynamic sparse training: masks that move while the network is trained."""

from lth_tf.dynamic.methods import DENSITIES, FRACTIONS, METHODS, Course, Method
from lth_tf.dynamic.moves import move

__all__ = ["DENSITIES", "FRACTIONS", "METHODS", "Course", "Method", "move"]
