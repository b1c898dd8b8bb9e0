"""Sweeps: a grid of experiments as processes of their own, with one index of what came out."""
