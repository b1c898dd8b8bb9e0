"""The best weights of the last mask, for trainings that prune on their way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras
from lth_tf.errors import UserError


class Best(keras.callbacks.Callback):
    """Ends a training with the best weights that it had under the last mask.

    `EarlyStopping(restore_best_weights=True)` and `ModelCheckpoint` bring back the epoch
    that was best of all, and with its weights its mask, which is denser where a training
    prunes gradually. Here each new mask (`set_mask`) begins anew.

    Args:
      monitor: a number in the epoch's logs.
      mode: 'min' or 'max', which of its values is the best.

    Attributes:
      value: the best one under the last mask, or None before an epoch has ended with it.
      epoch: when that was.

    Raises:
      UserError: another mode, or the logs lack `monitor`.
    """

    def __init__(self, monitor: str = "val_loss", mode: str = "min"):
        super().__init__()
        if mode not in ("min", "max"):
            raise UserError(f"mode {mode!r} is neither 'min' nor 'max'")
        self.monitor, self.mode = monitor, mode
        self._forget(0)

    def _forget(self, number: int) -> None:
        self._number = number
        self.value: float | None = None
        self.epoch: int | None = None
        self._best: dict[str, np.ndarray] = {}

    def _look(self, *_: Any) -> None:
        """A mask that was set since makes what was best before worthless."""
        if (number := pruning.masks_set(self.model)) != self._number:
            self._forget(number)

    def on_train_begin(self, logs: Any = None) -> None:
        """Begins anew."""
        self._forget(pruning.masks_set(self.model))

    # What the logs say was computed with the mask that was in force last at one of these.
    on_train_batch_end = on_test_begin = _look

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Remembers the weights, if they are the best under this mask."""
        if self.monitor not in (logs or {}):
            raise UserError(f"the logs have {sorted(logs or {})}, but no {self.monitor!r}")
        if pruning.masks_set(self.model) != self._number:  # it was set after the evaluation
            return
        value = float((logs or {})[self.monitor])
        sign = 1.0 if self.mode == "min" else -1.0
        if math.isfinite(value) and (self.value is None or sign * value < sign * self.value):
            self.value, self.epoch = value, epoch
            self._best = {n: v.numpy().copy() for n, v in pruning.weights(self.model).items()}

    def on_train_end(self, logs: Any = None) -> None:
        """Puts the best weights under the last mask in."""
        self._look()
        if self._best:
            mask = pruning.get_mask(self.model)
            pruning.assign(self.model, self._best, mask)
            pruning.set_mask(self.model, mask)
