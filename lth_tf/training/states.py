"""How far a training is, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf import distribute, pruning
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.models import Weights
from lth_tf.pruning import inside
from lth_tf.pruning.slots import optimizer_state


class DivergedError(UserError):
    """The loss is NaN or infinite."""


class Interrupted(UserError):
    """A training was asked to stop before its end."""

    code = 143  # what a shell says of a process that SIGTERM has ended


@dataclasses.dataclass
class State:
    """How far a training is; with variables and mask all that it needs to go on from there.

    Attributes:
      step: the next one.
      since: the step of the last evaluation.
      total: the sum of the losses of the steps since then, float64.
      rows: the evaluations so far; see `Trained`.
      seconds: how long it took.
      variables: name -> array: weights and optimizer; BatchNormalization's moving
        statistics of each replica.
      mask: kernel name -> 0/1 array, the one in force; None: the one it began with.
    """

    step: int
    since: int
    total: float
    rows: Sequence[dict[str, Any]]
    seconds: float
    variables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    mask: Mask | None = None


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
      weights: path -> array, at the end.
      rows: a dict per evaluation: step, loss (mean over the steps since the last
        evaluation), validation and test loss and metric (None where the test part
        was not looked at), learning_rate, seconds since the beginning.
      captured: the weights at the step asked for, or None.
      mask: kernel name -> 0/1 array, the one in force at the end.
    """

    weights: Weights
    rows: list[dict[str, Any]]
    captured: Weights | None
    mask: Mask


def read(model: Any, optimizer: Any, strategy: Any) -> dict[str, np.ndarray]:
    """Returns all that training changes: what replicas share, then each replica's own.

    Args:
      model: a pruned model.
      optimizer: its optimizer.
      strategy: its replicas'; every worker calls it.
    """
    shared: dict[str, np.ndarray] = {}
    own: dict[str, np.ndarray] = {}
    first = distribute.first_replica(strategy)
    for name, variable in _changed(model, optimizer):
        if distribute.is_own(variable):
            values = enumerate(variable.values, first)
            own |= {f"replica_{i}/{name}": value.numpy() for i, value in values}
        else:
            shared[name] = variable.numpy()
    for arrays, _ in distribute.workers_of(strategy).each((own, None)):
        shared |= arrays
    return shared


def restore(state: State, model: Any, optimizer: Any, strategy: Any) -> None:
    """Puts a state's mask and variables in force.

    Args:
      state: what to go on from.
      model, optimizer, strategy: see `read`.

    Raises:
      UserError: it lacks a variable.
    """
    if state.mask is not None:  # it may have moved since the beginning
        pruning.set_mask(model, state.mask, optimizer)
    first = distribute.first_replica(strategy)
    for name, variable in _changed(model, optimizer):
        own = distribute.is_own(variable)
        for i, part in enumerate(variable.values if own else [variable], first):
            key = f"replica_{i}/{name}" if own else name
            if key not in state.variables:
                raise UserError(
                    f"the checkpoint of step {state.step} lacks {key!r}: another version of "
                    "lth_tf wrote it; delete the level's checkpoint_* files to train it anew"
                )
            part.assign(state.variables[key])


def _changed(model: Any, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yields a name and the variable for each that training changes."""
    for name, variable in pruning.weights(model).items():
        yield f"weights/{name}", variable
    for i, variable in enumerate(optimizer_state(optimizer)):
        yield f"optimizer/{i:04d}", variable
    rate = inside.rate_of(pruning.inner_optimizer(optimizer))  # a callback may change it
    if isinstance(rate, tf.Variable):
        yield "optimizer/learning_rate", rate
