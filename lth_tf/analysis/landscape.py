"""Where solutions lie: distances and angles of weights, losses on lines between them, predictions.

What Evci et al. 2022 ("Gradient flow in sparse neural networks and how lottery tickets win",
section 5) look at: whether a ticket ends where the network ended that it was pruned from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import tf
from lth_tf.models.statistics import normalised, take_anew
from lth_tf.tasks import Task

Weights = Mapping[str, np.ndarray]


def flat(weights: Weights, names: Sequence[str]) -> np.ndarray:
    """Returns these weights as one vector, float64.

    Args:
      weights: path -> array.
      names: which, in their order.
    """
    return np.concatenate([np.ravel(weights[name]).astype(np.float64) for name in names])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the L2 distance of two vectors."""
    return float(np.linalg.norm(a - b))


def angle(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the angle between two vectors in degrees, NaN where one is zero.

    >>> round(angle(np.array([1.0, 0.0]), np.array([1.0, 1.0])), 9)
    45.0
    """
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    if not lengths:
        return float("nan")
    return float(np.degrees(np.arccos(np.clip(np.dot(a, b) / lengths, -1, 1))))


def between(a: Weights, b: Weights, share: float) -> dict[str, np.ndarray]:
    """Returns (1 - share) a + share b, path -> array; beyond the two where share is not in 0..1.

    Args:
      a, b: path -> array.
      share: how far it is to b.
    """
    return {name: ((1 - share) * w + share * b[name]).astype(w.dtype) for name, w in a.items()}


def barrier(shares: Sequence[float], losses: Sequence[float]) -> float:
    """Returns how far the loss rises between two ends, above the straight line between theirs.

    0 where it does not (Frankle et al. 2020, "Linear mode connectivity", section 2).

    Args:
      shares: where the losses are, 0 and 1 among them.
      losses: as many.
    """
    inside = {s: loss for s, loss in zip(shares, losses, strict=True) if -1e-9 <= s <= 1 + 1e-9}
    first, last = inside[min(inside)], inside[max(inside)]
    return max(loss - (1 - s) * first - s * last for s, loss in inside.items())


def disagreement(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the share of predictions in which two networks differ.

    Args:
      a, b: logits or probabilities [n, ..., classes].
    """
    return float(np.mean(a.argmax(-1) != b.argmax(-1)))


def ensemble(probabilities: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the logarithm of the mean of members' probabilities, [n, ..., classes].

    Args:
      probabilities: each member's, [n, ..., classes].
    """
    mean = np.mean([p.astype(np.float64) for p in probabilities], axis=0)
    return np.log(np.maximum(mean, np.finfo(np.float64).tiny))


def pairs(first: Sequence[Any], second: Sequence[Any], same: bool) -> list[tuple[Any, Any]]:
    """Returns the pairs between two groups, or within one.

    Args:
      first, second: their members.
      same: whether they are one group: no member is paired with itself, and each pair is there
        once.
    """
    return list(itertools.combinations(first, 2) if same else itertools.product(first, second))


class Looker:
    """A network under any weights, looked at on given examples.

    Args:
      model: a plain model; it gets the weights that are looked at.
      inputs: batches, as the network takes them.
      labels: of all of them.
      task: what is looked for.
      anew: whether moving statistics of BatchNormalization are taken anew under the weights that
        are looked at; a network between two others has none of its own.
      of: batches that they are taken of (default: the inputs).
    """

    def __init__(
        self, model: Any, inputs: Sequence[Any], labels: np.ndarray, task: Task,
        anew: bool = False, of: Sequence[Any] | None = None,
    ):  # fmt: skip
        self.model, self.inputs, self.labels, self.task = model, inputs, labels, task
        self.of = inputs if of is None else of
        self.anew = anew and bool(normalised(model))
        self._outputs = tf.function(lambda x: model(x, training=False), reduce_retracing=True)

    def outputs(self, weights: Weights) -> np.ndarray:
        """Returns what the network puts out, [n, ...].

        Args:
          weights: path -> array, of all weights.
        """
        pruning.assign(self.model, weights)
        if self.anew:
            take_anew(self.model, self.of)
        return np.concatenate([self._outputs(x).numpy() for x in self.inputs])

    def measured(self, weights: Weights) -> tuple[float, float]:
        """Returns the mean loss and the metric under these weights, path -> array."""
        outputs = self.outputs(weights)
        return self._mean(self.task.losses, outputs), self.metric(outputs)

    def metric(self, outputs: np.ndarray) -> float:
        """Returns the task's metric of what a network puts out."""
        return self._mean(self.task.hits, outputs)

    def _mean(self, of: Any, outputs: np.ndarray) -> float:
        found = of(tf.constant(self.labels), tf.constant(outputs)).numpy()
        return float(np.mean(found.astype(np.float64)))
