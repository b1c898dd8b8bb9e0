"""Command-line tools; run them as console commands or with `python -m lth_tf.tools.NAME`."""
