"""The diagonal of the Fisher information: weights without which outputs change most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.masks import Scores
from lth_tf.scorers.batches import Batch, Loss
from lth_tf.scorers.losses import cross_entropy
from lth_tf.scorers.network import Network


def squares(
    network: Network, values: Mapping[str, np.ndarray], batches: Iterable[Batch], loss: Loss
) -> dict[str, np.ndarray]:
    """Returns the mean over all examples of their squared gradients, one after the other.

    Args:
      network: of the model.
      values: kernel name -> array.
      batches: (inputs, int labels [n]).
      loss: (labels, logits) -> losses [n].
    """
    if batches is None:  # which says what is lacking
        network.gradient(values, batches, loss)
    total = {name: np.zeros(w.shape, np.float64) for name, w in values.items()}
    count = 0
    for inputs, labels in batches:
        for i in range(len(labels)):
            one = tf.nest.map_structure(lambda x: x[i : i + 1], inputs)  # noqa: B023
            gradient = network.gradient(values, [(one, labels[i : i + 1])], loss)
            for name, g in gradient.items():
                total[name] += np.square(g, dtype=np.float64)
            count += 1
    return {name: t / max(1, count) for name, t in total.items()}


def _network(model: Any, kernels: Mapping[str, Any]) -> tuple[Network, dict[str, np.ndarray]]:
    values = {name: np.asarray(kernel) for name, kernel in kernels.items()}
    return Network.of(model, batch_norm="eval"), values


def _second(
    network: Network, values: Mapping[str, np.ndarray], batches: Iterable[Batch], loss: Loss
) -> Scores:
    """w^2 F / 2."""
    found = squares(network, values, batches, loss)
    return {name: np.square(values[name], dtype=np.float64) * f / 2 for name, f in found.items()}


def fisher_diag(
    model: Any,
    kernels: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    loss: Loss = cross_entropy,
) -> Scores:
    """Returns w^2 F / 2, F the mean of the squared gradients of single examples.

    F is the diagonal of the empirical Fisher information, and the score what the loss is expected
    to rise by where a weight goes (Gollini et al. 2025, arXiv 2502.11450). Batch normalisation
    uses moving statistics: an example by itself has none.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, int labels [n]).
      loss: (labels, logits) -> losses [n].

    Returns:
      Kernel name -> float64 array of the kernel's shape.

    Raises:
      UserError: see `Network.gradient`.
    """
    return _second(*_network(model, kernels), batches, loss)


def fisher_taylor(
    model: Any,
    kernels: Mapping[str, Any],
    batches: Iterable[Batch],
    *,
    loss: Loss = cross_entropy,
) -> Scores:
    """Returns w g + w^2 F / 2: `fisher_diag` with the first order of the loss's expansion.

    Gollini et al. 2025 (arXiv 2502.11450). g is the gradient of the mean loss.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, int labels [n]).
      loss: (labels, logits) -> losses [n].

    Returns:
      Kernel name -> float64 array of the kernel's shape.

    Raises:
      UserError: see `Network.gradient`.
    """
    network, values = _network(model, kernels)
    second = _second(network, values, batches, loss)
    first = network.gradient(values, batches, loss)
    return {name: values[name] * first[name].astype(np.float64) + s for name, s in second.items()}
