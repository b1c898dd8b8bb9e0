"""Tasks: what a network is trained for. No other module knows what labels mean."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.registry import Registry


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
      losses: (labels, outputs) -> float[n], the loss of each example, in a graph.
      hits: (labels, outputs) -> numeric [n], whose mean is the metric.
      metric: its name in files and tables.
      higher: whether more of it is better.
      margin: a difference of less than that counts as none.
      percent: whether it is a fraction, and shown in %.
      positions: whether a network puts out logits for each position of an input, not one set.
      checked: (data set, part, labels, classes, shape of inputs) -> labels as they are needed; see
        `classes_of_examples`.
    """

    losses: Callable[[Any, Any], Any]
    hits: Callable[[Any, Any], Any]
    metric: str
    higher: bool
    margin: float
    percent: bool
    positions: bool = False
    checked: Callable[[str, str, np.ndarray, int, tuple[int, ...]], np.ndarray] = (
        lambda name, part, labels, classes, inputs: labels
    )

    @property
    def unit(self) -> tuple[float, str]:
        """What a value is multiplied by to be shown, and what stands behind it."""
        return (100.0, " (%)") if self.percent else (1.0, "")

    @property
    def form(self) -> str:
        """How a value is written: a format string."""
        return "{:.2%}" if self.percent else "{:.4g}"


def of_examples(values: Any) -> Any:
    """Returns the mean over the positions of each example: [n, ...] -> [n]."""
    from lth_tf.compat import tf  # data sets look at tasks, and are read without it

    return tf.reduce_mean(values, range(1, values.shape.rank)) if values.shape.rank > 1 else values


def cross_entropy(labels: Any, logits: Any) -> Any:
    """Returns -log softmax(logits)[label] of each example, float[n], a mean over its positions."""
    from lth_tf.compat import tf

    return of_examples(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def _correct(labels: Any, logits: Any) -> Any:
    from lth_tf.compat import tf

    return tf.argmax(logits, -1, tf.int32) == labels


def _bits(labels: Any, logits: Any) -> Any:
    return cross_entropy(labels, logits) / math.log(2)


def classes_of_examples(
    name: str, part: str, labels: np.ndarray, classes: int, inputs: tuple[int, ...]
) -> np.ndarray:
    """Returns labels that are a class for each example, int32 [n].

    Args:
      name, part: of the data set, and whether 'train' or 'test', for the sentence.
      labels: integers [n] or [n, 1], 0 to classes - 1.
      classes: how many there are.
      inputs: the shape of the inputs, not looked at.

    Raises:
      UserError: they are something else.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise UserError(
            f"data set {name!r} has {part} labels of shape {list(labels.shape)} and type "
            f"{labels.dtype}; give one whole number for each example, from 0 to {classes - 1}"
        )
    return _in_range(name, part, labels, classes)


def classes_of_positions(
    name: str, part: str, labels: np.ndarray, classes: int, inputs: tuple[int, ...]
) -> np.ndarray:
    """Returns labels that are a class for each position of the inputs, int32 [n, t].

    Args:
      name, part: of the data set, and whether 'train' or 'test', for the sentence.
      labels: integers of the shape of the inputs, 0 to classes - 1.
      classes: how many there are.
      inputs: the shape of the inputs.

    Raises:
      UserError: they are something else.
    """
    if labels.shape != inputs or labels.ndim != 2 or labels.dtype.kind not in "ui":
        raise UserError(
            f"data set {name!r} has {part} labels of shape {list(labels.shape)} and type "
            f"{labels.dtype} for inputs of shape {list(inputs)}; give a whole number for each "
            f"position of each input [n, t], from 0 to {classes - 1}"
        )
    return _in_range(name, part, labels, classes)


def _in_range(name: str, part: str, labels: np.ndarray, classes: int) -> np.ndarray:
    if classes < 2:
        raise UserError(f"data set {name!r} has {classes} class(es); a network needs two or more")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"data set {name!r} has the {part} label {low if low < 0 else high}; with {classes} "
            f"classes they go from 0 to {classes - 1}"
        )
    return labels.astype(np.int32, copy=False)


TASKS: Registry[Task] = Registry("task")

# Labels int32[n], 0 to classes - 1; outputs are logits [n, classes].
TASKS.register("classification")(
    Task(
        cross_entropy, _correct, "accuracy", higher=True, margin=0.005, percent=True,
        checked=classes_of_examples,
    )  # fmt: skip
)
# Labels int32[n, t], the class of what follows each position; outputs are logits [n, t, classes].
TASKS.register("language")(
    Task(
        cross_entropy, _bits, "bits_per_character", higher=False, margin=0.02, percent=False,
        positions=True, checked=classes_of_positions,
    )  # fmt: skip
)
METRIC = TASKS["classification"].metric  # of tables without a row


def metric_of(columns: Iterable[str]) -> str:
    """Returns the metric that a table's columns are about.

    >>> metric_of(["step", "test_loss", "test_accuracy"]), metric_of(["test_error_early"])
    ('accuracy', 'error')
    """
    for name in columns:
        if found := re.fullmatch(r"test_(?!loss)(.+?)(?:_early|_end)?", name):
            return found[1]
    return METRIC


def spoken(metric: str) -> str:
    """Returns a metric's name as people write it: 'bits per character'."""
    return metric.replace("_", " ")


def task_of(metric: str) -> Task:
    """Returns the task that a metric belongs to; raises UserError where there is none."""
    for task in TASKS.values():
        if task.metric == metric:
            return task
    known = ", ".join(task.metric for task in TASKS.values())
    raise UserError(f"no task has the metric {metric!r}; there are: {known}")
