"""The diagonal of the Hessian, by Hutchinson's estimate."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scorers.batches import Batch, Loss
from lth_tf.scorers.losses import cross_entropy
from lth_tf.scorers.network import Network


def hessian_diag(
    model: Any,
    kernels: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    probes: int = 10,
    batch_norm: str = "eval",
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Scores:
    """Returns w^2 D / 2, D the diagonal of the Hessian H of the mean loss.

    D is the mean of v * (H v) over vectors v of +1 and -1 drawn at random (Hutchinson 1990); the
    score is the saliency of LeCun et al. 1990 ("Optimal brain damage"), for weights that were not
    trained yet as in Gollini et al. 2025 (arXiv 2502.11450).

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, int labels [n]).
      probes: how many such vectors.
      batch_norm: 'eval' or 'train'.
      loss: (labels, logits) -> losses [n].
      seed: of what is drawn.

    Returns:
      Kernel name -> float64 array of the kernel's shape.

    Raises:
      UserError: see `Network.hessian_gradient`; or no probes.
    """
    if probes < 1:
        raise UserError(f"probes must be at least 1, not {probes}")
    network = Network.of(model, batch_norm=batch_norm)
    values = {name: np.asarray(kernel) for name, kernel in kernels.items()}
    rng = np.random.default_rng([seed, 23])
    diagonal = {name: np.zeros(w.shape, np.float64) for name, w in values.items()}
    for _ in range(probes):
        vector = {name: rng.choice([-1.0, 1.0], w.shape) for name, w in values.items()}
        product = network.hessian_product(values, batches, loss, vector)
        for name, p in product.items():
            diagonal[name] += vector[name] * p / probes
    return {name: np.square(values[name], dtype=np.float64) * d / 2 for name, d in diagonal.items()}
