"""Presets: absl flag files, found by `--preset=NAME`."""
