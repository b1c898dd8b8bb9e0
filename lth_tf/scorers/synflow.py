"""SynFlow: keep the weights through which most can flow, without data (Tanaka et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.masks import Scores
from lth_tf.scorers.network import Network


def synflow(model: Any, kernels: Mapping[str, Any], batches: Any = None) -> Scores:
    """Returns |w| * dR/d|w|, R the sum of the outputs for an image of ones (section 6).

    All parameters are taken by their absolute values, BatchNormalization's moving
    statistics too, which it uses. In a network that is homogeneous and has no biases, the
    scores of every layer add up to R. In float64: with the fan-ins of a VGG-19 float32
    overflows.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: only for its shape, where a subclassed model does not know that of its inputs.

    Returns:
      Kernel name -> float64 array of the kernel's shape.

    Raises:
      UserError: the flow is not finite, or the shape of inputs is not known.
    """
    network = Network.of(model, dtype="float64", batch_norm="eval", others=tf.abs)
    return network.flow({n: np.abs(np.asarray(k)) for n, k in kernels.items()}, batches)
