"""Rewinding: the only door by which weights enter a model before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.slots import renew


class Rewind(keras.callbacks.Callback):
    """Starts training from mask x saved weights, and saves weights to rewind to.

    At the beginning of training the model gets the mask, mask x weights bit for bit,
    the step counter and an optimizer state as if nothing had been trained (Frankle
    and Carbin 2019, section 1, step 4; Frankle et al. 2020 for steps above 0).

    A learning rate that another callback changed is not put back: what it was before is
    nowhere written.

    Args:
      weights: path -> array for every weight of the model, as `pruning.weights`
        names them; None starts from the weights the model has.
      mask: kernel name -> 0/1 array; None keeps the mask the model has.
      step: the step at which training starts, read by learning-rate schedules.
      capture: the step after which the weights are saved in `captured`; 0 saves what
        training starts from.
      captured: called with those weights as soon as they are there.

    Attributes:
      captured: path -> array, or None before step `capture`.

    Raises:
      UserError: names or shapes do not fit the model; or `capture` is jumped over,
        because it lies inside a block of `steps_per_execution` steps.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray] | None = None,
        mask: Mask | None = None,
        *,
        step: int = 0,
        capture: int | None = None,
        captured: Callable[[dict[str, np.ndarray]], None] | None = None,
    ):
        super().__init__()
        if capture is not None and capture < step:
            raise UserError(f"cannot capture step {capture}: training starts at step {step}")
        self.weights, self.mask, self.step, self.capture = weights, mask, step, capture
        self.captured: dict[str, np.ndarray] | None = None
        self._tell = captured

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts weights, mask, step and clean slots in."""
        optimizer = self.model.optimizer
        if self.weights is not None:
            pruning.assign(self.model, self.weights)
        mask = pruning.get_mask(self.model) if self.mask is None else self.mask
        pruning.set_mask(self.model, mask, optimizer)
        renew(optimizer, self.model)
        pruning.set_mask(self.model, mask, optimizer)  # Adagrad's slots do not start at 0
        optimizer.iterations.assign(self.step)
        if self.capture == self.step:
            self._capture()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves the weights at step `capture`."""
        if self.capture is None or self.captured is not None:
            return
        # Loss scaling skips updates, so lth_tf's own loop counts for itself.
        iterations = int(keras.backend.get_value(self.model.optimizer.iterations))
        step = (logs or {}).get("step", iterations)
        if step == self.capture:
            self._capture()
        elif step > self.capture:
            raise UserError(
                f"step {self.capture}, whose weights were to be saved, was jumped over (now at "
                f"{step}); choose a multiple of steps_per_execution"
            )

    def _capture(self) -> None:
        self.captured = {n: v.numpy().copy() for n, v in pruning.weights(self.model).items()}
        if self._tell:
            self._tell(self.captured)

    def on_train_end(self, logs: Any = None) -> None:
        """Raises UserError if training ended before step `capture`."""
        if self.capture is not None and self.captured is None:
            raise UserError(
                f"training ended before step {self.capture}, whose weights were to be saved"
            )
