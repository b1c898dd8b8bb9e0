"""Losses that scorers differentiate: (labels int[n], logits float[n, classes]) -> float[n]."""

from __future__ import annotations

from typing import Any

from lth_tf.compat import tf
from lth_tf.registry import Registry
from lth_tf.scorers.batches import Loss

LOSSES: Registry[Loss] = Registry("loss")


@LOSSES.register("cross_entropy")
def cross_entropy(labels: Any, logits: Any) -> Any:
    """Returns -log softmax(logits)[label] of each example."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


@LOSSES.register("squared_error")
def squared_error(labels: Any, logits: Any) -> Any:
    """Returns the squared distance of each example's logits from its one-hot label."""
    wanted = tf.one_hot(labels, tf.shape(logits)[-1], dtype=logits.dtype)
    return tf.reduce_sum(tf.math.squared_difference(logits, wanted), -1)
