"""How far a training is, and how it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf import distribute, pruning, storage
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.execution import Decision
from lth_tf.masks import Mask
from lth_tf.models import Weights
from lth_tf.pruning import inside
from lth_tf.pruning.slots import optimizer_state
from lth_tf.tasks import metric_of


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
      decision: how it is computed, see `execution.Decision`; None: as its default says.
      moves: name -> array: what a `moving.Mover` has to know besides.
    """

    step: int
    since: int
    total: float
    rows: Sequence[dict[str, Any]]
    seconds: float
    variables: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    mask: Mask | None = None
    decision: dict[str, Any] | None = None
    moves: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
      weights: path -> array, at the end.
      rows: a dict per evaluation: step, loss (mean over the steps since the last
        evaluation), validation and test loss and metric (None where the test part
        was not looked at), learning_rate, seconds since the beginning (of evaluations that
        were done in one call spread evenly, for nobody knows); and what of MEASURED was asked for.
      captured: the weights at the step asked for, or None.
      mask: kernel name -> 0/1 array, the one in force at the end.
      decision: how it was computed.
      updates: a dict per update of the mask, see `moving.Mover`.
    """

    weights: Weights
    rows: list[dict[str, Any]]
    captured: Weights | None
    mask: Mask
    decision: Decision = Decision()
    updates: Sequence[dict[str, float]] = ()


# What an evaluation says besides, where it was asked for (`Spec.measure`).
MEASURED = ("gradient_flow", "gradient_flow_fixed")


def columns(metric: str, given: Iterable[str] = ()) -> list[str]:
    """Returns what an evaluation says, in the order of metrics.csv.

    >>> columns("accuracy", ["gradient_flow"])[-3:]
    ['learning_rate', 'gradient_flow', 'seconds']

    Args:
      metric: the task's.
      given: names among which are those of MEASURED that it says.
    """
    each = [f"{part}_{name}" for part in ("validation", "test") for name in ("loss", metric)]
    given = set(given)
    measured = [name for name in MEASURED if name in given]
    return ["step", "loss", *each, "learning_rate", *measured, "seconds"]


def require_rows(rows: Any) -> None:
    """Raises ValueError unless these can be the evaluations of one training, in their order."""
    storage.require(isinstance(rows, (list, tuple)) and rows, "it has no evaluations")
    names = columns(metric_of(rows[0]), rows[0])
    for i, row in enumerate(rows):
        storage.require(sorted(row) == sorted(names), "an evaluation has other columns")
        before = rows[i - 1] if i else None
        later = storage.is_count(row["step"]) and (not before or before["step"] < row["step"])
        storage.require(later, f"the step {row['step']!r} is out of order")
        for name in ("validation_loss", "learning_rate", "seconds", *(["loss"] if i else ())):
            storage.require(storage.is_number(row[name]), f"{name} at step {row['step']}")
        storage.require(row["seconds"] >= 0, f"seconds at step {row['step']}")
        storage.require(i or row["loss"] is None, "a loss before the first step")
        for name in names[7:-1]:
            told = row[name] is None or storage.is_number(row[name])
            storage.require(told, f"{name} at step {row['step']}")
        for name in (names[3], names[5]):
            told = type(row[name]) in (int, float) or (name == names[5] and row[name] is None)
            storage.require(told, f"{name} at step {row['step']}")
        tested = type(row["test_loss"]) in (int, float)
        alike = tested if row[names[5]] is not None else row["test_loss"] is None
        lowest = all(row["validation_loss"] < other["validation_loss"] for other in rows[:i])
        storage.require(alike and (tested or not lowest), f"test_loss at step {row['step']}")


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
      UserError: it lacks a variable, or one does not fit.
    """
    if state.mask is not None:  # it may have moved since the beginning
        pruning.set_mask(model, state.mask, optimizer)
    first = distribute.first_replica(strategy)
    for name, variable in _changed(model, optimizer):
        own = distribute.is_own(variable)
        for i, part in enumerate(variable.values if own else [variable], first):
            key = f"replica_{i}/{name}" if own else name
            if key not in state.variables:
                raise _unfit(state, f"lacks {key!r}: another version of lth_tf wrote it")
            try:
                part.assign(state.variables[key])
            except (ValueError, TypeError) as error:
                raise _unfit(state, f"has {key!r} of another shape or type") from error
    try:
        pruning.check(model, optimizer)
    except pruning.InvariantError as error:
        raise _unfit(state, "has weights or slots that exceed its mask") from error


def _unfit(state: State, why: str) -> UserError:
    return UserError(
        f"the checkpoint of step {state.step} {why}; delete the level's checkpoint_* files to "
        "train it anew"
    )


def _changed(model: Any, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yields a name and the variable for each that training changes."""
    for name, variable in pruning.weights(model).items():
        yield f"weights/{name}", variable
    for i, variable in enumerate(optimizer_state(optimizer)):
        yield f"optimizer/{i:04d}", variable
    rate = inside.rate_of(pruning.inner_optimizer(optimizer))  # a callback may change it
    if isinstance(rate, tf.Variable):
        yield "optimizer/learning_rate", rate
