"""Tasks: what a network is trained for. No other module knows what labels mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

from lth_tf.compat import tf
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
    """

    losses: Callable[[Any, Any], Any]
    hits: Callable[[Any, Any], Any]
    metric: str
    higher: bool
    margin: float
    percent: bool

    @property
    def unit(self) -> tuple[float, str]:
        """What a value is multiplied by to be shown, and what stands behind it."""
        return (100.0, " (%)") if self.percent else (1.0, "")

    @property
    def form(self) -> str:
        """How a value is written: a format string."""
        return "{:.2%}" if self.percent else "{:.4g}"


def cross_entropy(labels: Any, logits: Any) -> Any:
    """Returns -log softmax(logits)[label] of each example, float[n]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _correct(labels: Any, logits: Any) -> Any:
    return tf.argmax(logits, -1, tf.int32) == labels


TASKS: Registry[Task] = Registry("task")

# Labels int32[n], 0 to classes - 1; outputs are logits [n, classes].
TASKS.register("classification")(
    Task(cross_entropy, _correct, "accuracy", higher=True, margin=0.005, percent=True)
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


def task_of(metric: str) -> Task:
    """Returns the task that a metric belongs to; raises UserError where there is none."""
    for task in TASKS.values():
        if task.metric == metric:
            return task
    known = ", ".join(task.metric for task in TASKS.values())
    raise UserError(f"no task has the metric {metric!r}; there are: {known}")
