"""Measurements of speed and memory: ratios, of contenders that alternate in one process."""

from lth_tf.bench.measurements import MEASUREMENTS, Measurement, measure

__all__ = ["MEASUREMENTS", "Measurement", "measure"]
