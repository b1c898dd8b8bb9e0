"""GraSP: keep the weights that the flow of gradients needs (Wang et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scorers.batches import Batch, Loss, numbers_of
from lth_tf.scorers.losses import cross_entropy
from lth_tf.scorers.network import Network

VARIANTS = ("paper", "official", "absolute")


def grasp(
    model: Any,
    kernels: Mapping[str, Any],
    batches: Iterable[Batch] | None,
    *,
    variant: str = "paper",
    temperature: float = 200.0,
    batch_norm: str = "train",
    loss: Loss = cross_entropy,
    seed: int = 0,
) -> Scores:
    """Returns w * (H g), where g and H are gradient and Hessian of the mean loss.

    Pruning w changes the squared norm of the gradient by about -2 w * (H g) (section 4 of the
    paper, with delta = -w); it calls -w * (H g) the score and removes the highest.

    Args:
      model: a plain model.
      kernels: kernel name -> what to score at.
      batches: (inputs, int labels [n]); the paper takes ten examples of each class. In
        train mode statistics are those of each batch.
      variant: 'paper'; 'absolute', |w * (H g)| (Frankle et al. 2021, appendix); or 'official',
        which differs from the paper as the published code does: each batch is sorted by
        class and halved, the losses of the halves are added up, and dense kernels are
        drawn anew for scoring (Glorot normal).
      temperature: T, which divides the logits.
      batch_norm: 'train' (published code) or 'eval'.
      loss: (labels, logits) -> losses [n].
      seed: of what 'official' draws.

    Returns:
      Kernel name -> float32 or float64 array of the kernel's shape.

    Raises:
      UserError: see `Network.hessian_gradient`.
    """
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r} of grasp; there are: {', '.join(VARIANTS)}")
    if not temperature > 0:
        raise UserError(f"temperature {temperature} is out of range; it must be above 0")
    network = Network.of(model, batch_norm=batch_norm)
    values = {name: np.asarray(kernel) for name, kernel in kernels.items()}
    official = variant == "official"
    if official:
        batches = [half for batch in batches or () for half in _halves(*batch)]
        values = _redrawn(values, seed)

    products = network.hessian_gradient(
        values, batches, loss, temperature=temperature, summed=official
    )
    scores = {name: values[name] * product for name, product in products.items()}
    return {n: np.abs(s) for n, s in scores.items()} if variant == "absolute" else scores


def _halves(inputs: Any, labels: Any) -> list[Batch]:
    numbers = numbers_of(labels)
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, [len(order) // 2])
    return [(np.asarray(inputs)[part], numbers[part]) for part in parts]


def _redrawn(kernels: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Dense kernels as Glorot normal ones, zeros of a mask kept."""
    rng = np.random.default_rng([seed, 21])
    drawn = {}
    for name, w in kernels.items():
        if w.ndim == 2:
            fresh = rng.normal(0, (2 / sum(w.shape)) ** 0.5, w.shape).astype(w.dtype)
            w = np.where(w != 0, fresh, 0)
        drawn[name] = w
    return drawn
