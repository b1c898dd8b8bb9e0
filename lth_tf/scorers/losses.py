"""Losses that scorers differentiate: (labels int[n], logits float[n, classes]) -> float[n].

Where there are logits for each position of an input, [n, t, classes], labels are int[n, t] and a
loss is the mean over the positions of an example.
"""

from __future__ import annotations

from typing import Any

from lth_tf.compat import tf
from lth_tf.registry import Registry
from lth_tf.scorers.batches import Loss
from lth_tf.tasks import cross_entropy, of_examples

__all__ = ["LOSSES", "cross_entropy", "squared_error"]

LOSSES: Registry[Loss] = Registry("loss")
LOSSES.register("cross_entropy")(cross_entropy)


@LOSSES.register("squared_error")
def squared_error(labels: Any, logits: Any) -> Any:
    """Returns the squared distance of each example's logits from its one-hot label."""
    wanted = tf.one_hot(labels, tf.shape(logits)[-1], dtype=logits.dtype)
    return of_examples(tf.reduce_sum(tf.math.squared_difference(logits, wanted), -1))
