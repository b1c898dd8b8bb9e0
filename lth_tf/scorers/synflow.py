"""SynFlow: keep the weights through which most can flow, without data (Tanaka et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scorers.network import Network


def synflow(model: Any, kernels: Mapping[str, Any], batches: Any = None) -> Scores:
    """Returns |w| * dR/d|w|, R the sum of the outputs for an input of ones (section 6).

    All parameters are taken by their absolute values, BatchNormalization's moving
    statistics too, which it uses; layers that scale inputs are left out. In a network that
    is homogeneous and has no biases, the scores of every layer add up to R. In float64: with
    the fan-ins of a VGG-19 float32 overflows. Activations go on beyond the point where they
    saturate: the flow is above it everywhere, and the derivative would be zero. Queries and keys
    of attention score 0, since an input of ones is the same everywhere.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: only for its shape, where a subclassed model does not know that of its inputs.

    Returns:
      Kernel name -> float64 array of the kernel's shape.

    Raises:
      UserError: the flow is zero or not finite, saturates in a way that cannot be undone, or
        the shape of inputs is not known.
    """
    network = Network.of(
        model, dtype="float64", others=tf.abs, preprocessing=False, saturation=False
    )
    values = {name: np.abs(np.asarray(kernel)) for name, kernel in kernels.items()}
    scores = network.flow(values, batches)
    whole = all(v.all() for v in values.values())  # a mask may cut the network, on purpose
    if whole and not any(s.any() for s in scores.values()):
        raise UserError(
            f"nothing flows through model {network.model.name!r}: does it end in a softmax, begin "
            "with a layer that makes ones negative?"
        )
    return scores
