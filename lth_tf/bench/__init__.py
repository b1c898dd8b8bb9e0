"""Measurements of speed and memory: ratios, of contenders that alternate in one process."""
