"""Tasks: what a network is trained for. No other module knows what labels mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lth_tf.compat import tf
from lth_tf.registry import Registry


@dataclasses.dataclass(frozen=True)
class Task:
    """What a network is trained for.

    Attributes:
      losses: (labels, outputs) -> float[n], the loss of each example, in a graph.
      hits: (labels, outputs) -> numeric [n], whose mean is the metric.
      metric: its name in files and tables.
      higher: whether more of it is better.
    """

    losses: Callable[[Any, Any], Any]
    hits: Callable[[Any, Any], Any]
    metric: str
    higher: bool = True


def _cross_entropy(labels: Any, logits: Any) -> Any:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def _correct(labels: Any, logits: Any) -> Any:
    return tf.argmax(logits, -1, tf.int32) == labels


TASKS: Registry[Task] = Registry("task")

# Labels int32[n], 0 to classes - 1; outputs are logits [n, classes].
TASKS.register("classification")(Task(_cross_entropy, _correct, "accuracy"))
