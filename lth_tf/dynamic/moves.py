"""The update itself: what of a mask is dropped, and what is grown."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lth_tf.budgets import rank, top_k
from lth_tf.masks import Mask, Scores


def move(
    mask: Mask,
    weights: Scores,
    growth: Scores | None,
    *,
    targets: Mapping[str, int],
    fraction: float = 0.0,
    pooled: bool = False,
) -> Mask:
    """Returns the mask after an update; as many weights are kept as the targets say.

    Of each kernel with a target of n weights, k = floor(fraction * n) are replaced: the n - k of
    its kept weights that are largest stay (Drop), and the k of all others that rank highest join
    (Grow), the dropped ones among them. Evci et al. 2020, algorithm 1. Of equal ones the earlier
    is taken.

    Args:
      mask: kernel name -> 0/1 array.
      weights: kernel name -> array; by their magnitude is dropped.
      growth: kernel name -> array; by these is grown, highest first. None: nothing is.
      targets: kernel name -> weights to keep, at most those that the mask keeps.
      fraction: of them, replaced.
      pooled: whether weights of all kernels compete for what the targets keep in all; a kernel's
        target is then what they leave it.

    Returns:
      Kernel name -> uint8 array.
    """
    sizes = {name: np.abs(weights[name]) for name in mask}
    if pooled:
        names = list(mask)
        kept = rank([sizes[n] for n in names], sum(targets.values()), [mask[n] for n in names])
        targets = {n: int(np.count_nonzero(m)) for n, m in zip(names, kept, strict=True)}
    found = {}
    for name, m in mask.items():
        many = int(fraction * targets[name] + 1e-9) if growth is not None else 0
        new = top_k(sizes[name], targets[name] - many, m)
        if many and growth is not None:
            new = new | top_k(growth[name], many, new == 0)
        found[name] = new.astype(np.uint8)
    return found
