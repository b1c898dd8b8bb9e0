"""SNIP: keep the weights on which the loss depends most (Lee et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scorers.batches import Batch, Loss
from lth_tf.scorers.losses import cross_entropy
from lth_tf.scorers.network import Network

VARIANTS = ("paper", "official")


def snip(
    model: Any,
    kernels: Mapping[str, Any],
    batches: Iterable[Batch] | None,
    *,
    variant: str = "paper",
    batch_norm: str = "eval",
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Scores:
    """Returns |w * g| / sum |w * g|, g the gradient of the mean loss (section 4).

    Over several batches g is the mean gradient of all examples, as in one large batch.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, int labels [n]); the paper takes one batch of 100 or 128.
      variant: 'paper', or 'official': scored on weights drawn anew (variance 1 / fan-in,
        truncated normal), since the published code re-initialises after pruning.
        What it also does is left out: it prunes biases, which are zero then and so score 0.
      batch_norm: 'eval' (published code) or 'train'.
      loss: (labels, logits) -> losses [n].
      seed: of what 'official' draws.

    Returns:
      Kernel name -> float32 or float64 array of the kernel's shape; they add up to 1.

    Raises:
      UserError: see `Network.gradient`; or the gradient is zero everywhere.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r} of snip; there are: {', '.join(VARIANTS)}")
    network = Network.of(model, batch_norm=batch_norm)
    values = {name: np.asarray(kernel) for name, kernel in kernels.items()}
    if variant == "official":
        values = _redrawn(values, seed)
    gradients = network.gradient(values, batches, loss)
    scores = {name: np.abs(values[name] * g) for name, g in gradients.items()}
    total = sum(float(s.sum(dtype=np.float64)) for s in scores.values())
    if not total:
        raise UserError(
            "the gradient is zero everywhere, so no weight ranks above another: is the network "
            "cut, or saturated by the inputs' scale?"
        )
    return {name: (s / total).astype(s.dtype) for name, s in scores.items()}


def _redrawn(kernels: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Kernels of variance 1 / fan-in, truncated at two deviations; zeros of a mask kept."""
    rng = np.random.default_rng([seed, 22])
    drawn = {}
    for name, w in kernels.items():
        fresh = rng.normal(size=w.shape)
        while (far := np.abs(fresh) > 2).any():
            fresh[far] = rng.normal(size=np.count_nonzero(far))
        # 0.8796: the deviation of a standard normal cut at 2.
        fresh *= math.sqrt(1 / math.prod(w.shape[:-1])) / 0.87962566103423978
        drawn[name] = np.where(w != 0, fresh, 0).astype(w.dtype)
    return drawn
