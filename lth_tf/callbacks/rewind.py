"""Rewinding: the only door by which weights enter a model before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import was_resumed
from lth_tf.pruning.slots import is_built, optimizer_state, renew


class Rewind(keras.callbacks.Callback):
    """Starts training from mask x saved weights, and saves weights to rewind to.

    At the beginning of training the model gets the mask, mask x weights bit for bit,
    the step counter and an optimizer state as if nothing had been trained (Frankle
    and Carbin 2019, section 1, step 4; Frankle et al. 2020 for steps above 0).

    Where `BackupAndRestore` goes on with a training that was interrupted, nothing is put in.

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
      optimizers: all that train the model, where it has others than the one it is compiled
        with (a GAN); steps are counted by the first.

    Attributes:
      captured: path -> array, or None before step `capture`.

    Raises:
      UserError: names or shapes do not fit the model; or `capture` is jumped over,
        because it lies inside a block of `steps_per_execution` steps; or it is not known
        which optimizer trains; or `fit` begins at an epoch (`initial_epoch`) other than
        that of `step`, whereupon the model is as it was.
    """

    def __init__(
        self,
        weights: Mapping[str, np.ndarray] | None = None,
        mask: Mask | None = None,
        *,
        step: int = 0,
        capture: int | None = None,
        captured: Callable[[dict[str, np.ndarray]], None] | None = None,
        optimizers: Sequence[Any] | None = None,
    ):
        super().__init__()
        if capture is not None and capture < step:
            raise UserError(f"cannot capture step {capture}: training starts at step {step}")
        self.weights, self.mask, self.step, self.capture = weights, mask, step, capture
        self.captured: dict[str, np.ndarray] | None = None
        self._tell, self._given = captured, optimizers
        self.params: Any = None  # `fit` tells them, lth_tf's own loop does not
        self._before: list[tuple[Any, np.ndarray]] | None = None

    def _optimizers(self) -> list[Any]:
        if self._given is not None:
            return list(self._given)
        found = pruning.optimizers_of(self.model)
        if len(found) != 1:
            names = ", ".join(type(pruning.inner_optimizer(each)).__name__ for each in found)
            raise UserError(
                f"model {self.model.name!r} has {len(found)} optimizers ({names}), of which Rewind "
                "cannot know which train it; name them: Rewind(optimizers=[...])"
                if found
                else f"model {self.model.name!r} has no optimizer; compile it, or name those that "
                "train it: Rewind(optimizers=[...])"
            )
        return found

    def on_train_begin(self, logs: Any = None) -> None:
        """Puts weights, mask, step and clean slots in."""
        optimizers = self._optimizers()
        self._first = optimizers[0]
        if was_resumed(self.model):
            self._go_on()
            return
        if self.params:  # only later it is told at which epoch training begins
            state = [v for each in optimizers for v in optimizer_state(each)]
            self._before = [(v, v.numpy()) for v in (*self.model.variables, *state)]
            self._old = pruning.get_mask(self.model)
        if self.weights is not None:
            pruning.assign(self.model, self.weights)
        mask = pruning.get_mask(self.model) if self.mask is None else self.mask
        for optimizer in optimizers:
            pruning.set_mask(self.model, mask, optimizer)
            # One that was named is built for what it trains: in its first step, if not yet.
            if self._given is None or is_built(optimizer):
                renew(optimizer, self.model)
                pruning.set_mask(self.model, mask, optimizer)  # Adagrad's slots do not start at 0
            optimizer.iterations.assign(self.step)
        if self.capture == self.step:
            self._capture()

    def _go_on(self) -> None:
        """A training goes on that began in another process, or before an error."""
        pruning.set_mask(self.model, pruning.get_mask(self.model), self._first)
        step = int(keras.backend.get_value(self._first.iterations))
        if self.capture is not None and self.capture <= step and self.captured is None:
            if self._tell is None:
                raise UserError(
                    f"the training goes on from step {step}; the weights of step {self.capture} "
                    "are gone with the process that passed it: have them saved there (captured=)"
                )
            self.capture = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Raises UserError where training does not begin at the epoch of `step`."""
        before, self._before = self._before, None
        if before is None or not epoch:
            return
        if was_resumed(self.model):  # by a BackupAndRestore that comes later in the list
            self._go_on()
            return
        steps = self.params.get("steps")
        if self.step == 0 or (steps and self.step != epoch * steps):
            for variable, value in before:
                variable.assign(value)
            pruning.set_mask(self.model, self._old, self._first)
            raise UserError(
                f"training begins at epoch {epoch} (initial_epoch), Rewind's step {self.step} is "
                "another; to go on from the weights that the model has leave Rewind out, to "
                f"rewind to this epoch give its step ({epoch} x the steps of an epoch)"
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Saves the weights at step `capture`."""
        if self.capture is None or self.captured is not None:
            return
        # Loss scaling skips updates, so lth_tf's own loop counts for itself.
        iterations = int(keras.backend.get_value(self._first.iterations))
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
