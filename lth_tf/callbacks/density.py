"""Checks at every epoch that what was pruned stays pruned."""

from __future__ import annotations

from typing import Any

from lth_tf import masks, pruning
from lth_tf.compat import keras


class Density(keras.callbacks.Callback):
    """Checks the invariant at the end of every epoch and logs the density.

    Adds 'density', the fraction of prunable weights kept, to the epoch's logs; put it
    before callbacks that write logs.

    Raises:
      InvariantError: a pruned weight or a slot of one of the model's optimizers is not
        zero, or the mask is another than was set.
    """

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Takes the mask that the model has for the one in force, if none was set."""
        pruning.note(self.model)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Checks and logs."""
        for optimizer in pruning.optimizers_of(self.model) or [None]:
            pruning.check(self.model, optimizer)
        if logs is not None:
            logs["density"] = masks.density(pruning.get_mask(self.model))
