"""Scorers: which weights matter. (model, kernels, batches, *, options) -> scores, higher = keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.masks import Scores
from lth_tf.registry import Registry

Scorer = Callable[..., Scores]
SCORERS: Registry[Scorer] = Registry("scorer")
LOSSES: Registry[Callable[[Any, Any], Any]] = Registry("loss")


@LOSSES.register("cross_entropy")
def cross_entropy(labels: Any, logits: Any) -> Any:
    """Returns -log softmax(logits)[label] of each example: int[n], float[n, classes] -> [n]."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


@LOSSES.register("squared_error")
def squared_error(labels: Any, logits: Any) -> Any:
    """Returns the squared distance of each example's logits from its one-hot label, [n]."""
    wanted = tf.one_hot(labels, tf.shape(logits)[-1], dtype=logits.dtype)
    return tf.reduce_sum(tf.math.squared_difference(logits, wanted), -1)


@SCORERS.register("magnitude")
def magnitude(model: Any, kernels: Mapping[str, Any], batches: Any = None) -> Scores:
    """Returns |w|, in float32 or wider (Han et al. 2015; Frankle and Carbin 2019, section 1).

    Args:
      model: not looked at; a scorer's signature has it.
      kernels: kernel name -> variable or array.
      batches: not needed.

    Returns:
      Kernel name -> array of the kernel's shape.
    """
    return {name: _wide(np.abs(np.asarray(kernel))) for name, kernel in kernels.items()}


def _wide(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == np.float64 else values.astype(np.float32)
