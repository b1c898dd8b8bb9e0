"""Scopes turn scores into masks: which weights compete with each other, and for how many places.

A scope is a function (scores, density, within) -> mask that keeps exactly
k = round(density * n) of the n weights that compete. `density` is one number for all
kernels or a dict kernel name -> number, where 1.0 protects a kernel. With `within` only
weights that this mask keeps can be kept, so the new mask is nested in it; densities are
always fractions of whole kernels, not of what `within` keeps.

Equal scores are broken by position, the earlier entry (in kernel order, row-major)
wins, so that k holds exactly whatever the scores are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores
from lth_tf.registry import Registry

Density = float | Mapping[str, float]
Scope = Callable[..., Mask]
SCOPES: Registry[Scope] = Registry("scope")


def count(density: float, n: int) -> int:
    """Returns k, the number of weights that `density` keeps of n; halves round up.

    >>> count(0.5, 5), count(0.2, 266_200)
    (3, 53240)
    """
    return int(np.floor(density * n + 0.5))


def top_k(scores: np.ndarray, k: int, eligible: np.ndarray | None = None) -> np.ndarray:
    """Returns uint8 ones at the k highest scores, ties to the earlier index.

    Args:
      scores: float array of any shape.
      k: how many entries to keep.
      eligible: array of that shape, 0 where an entry must not be kept.

    Raises:
      UserError: a score is NaN or infinite, or fewer than k entries are eligible.

    >>> top_k(np.array([1.0, 3.0, 3.0, 3.0]), 2)
    array([0, 1, 1, 0], dtype=uint8)
    """
    flat = np.asarray(scores).reshape(-1)
    if not np.all(np.isfinite(flat)):
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(flat))} of {flat.size} scores are NaN or infinite; "
            "no ranking is possible: look for a diverged training or an overflow in the scorer"
        )
    candidates = np.arange(flat.size) if eligible is None else np.flatnonzero(eligible)
    if k > candidates.size:
        raise UserError(
            f"cannot keep {k} weights: only {candidates.size} of {flat.size} are eligible; "
            "a mask is never grown by pruning, so ask for a lower density"
        )
    out = np.zeros(flat.size, np.uint8)
    if k > 0:
        values = flat[candidates]
        # Everything above the k-th value is in; what equals it is taken in order.
        # A selection is ten times faster than the stable sort it stands for.
        kth = np.partition(values, values.size - k)[values.size - k]
        above = values > kth
        out[candidates[above]] = 1
        ties = candidates[values == kth]
        out[ties[: k - int(np.count_nonzero(above))]] = 1
    return out.reshape(np.shape(scores))


def _per_kernel(scores: Scores, density: Density) -> dict[str, float]:
    """Spells out a density for every kernel, checked."""
    if isinstance(density, Mapping):
        if unknown := sorted(set(density) - set(scores)):
            raise UserError(
                f"density given for unknown kernels {unknown}; the kernels are {list(scores)}"
            )
        if missing := [name for name in scores if name not in density]:
            raise UserError(f"no density given for the kernels {missing}; 1.0 protects a kernel")
        each = {name: float(density[name]) for name in scores}
    else:
        each = {name: float(density) for name in scores}
    for name, d in each.items():
        if not 0 < d <= 1:
            raise UserError(
                f"density {d} (kernel {name!r}) is out of range; it is the fraction of weights "
                "kept, above 0 and at most 1"
            )
    return each


def _checked(mask: Mask) -> Mask:
    """A kernel that lost everything cuts the network: never in silence."""
    if empty := [name for name, m in mask.items() if not m.any()]:
        raise UserError(
            f"nothing would be left of {', '.join(empty)}: the network would be cut; "
            "ask for a higher density or use a scope that keeps a share of every kernel"
        )
    return mask


@SCOPES.register("global")
def global_(scores: Scores, density: Density, within: Mask | None = None) -> Mask:
    """One ranking over all kernels: the k highest scores of the whole network are kept.

    With a dict of densities, kernels at 1.0 stay out of the ranking and are kept
    whole; the others share the sum of their budgets.

    Args:
      scores: kernel name -> float array, higher = keep.
      density: fraction to keep, or kernel name -> fraction.
      within: only weights kept by this mask compete.

    Returns:
      Kernel name -> uint8 array; exactly round(density * N) ones of all N weights.

    Raises:
      UserError: a density out of range, scores that cannot be ranked, more weights
        asked for than `within` has, or a kernel left empty.

    >>> global_({"a": np.array([1.0, 5.0]), "b": np.array([2.0, 3.0, 4.0, 0.0])}, 0.5)
    {'a': array([0, 1], dtype=uint8), 'b': array([0, 1, 1, 0], dtype=uint8)}
    """
    each = _per_kernel(scores, density)
    if within is None:
        within = {name: np.ones(np.shape(s), np.uint8) for name, s in scores.items()}
    free = [name for name in scores if each[name] < 1]
    mask = {n: top_k(s, np.size(s), within[n]) for n, s in scores.items() if n not in free}
    if free:
        flat = np.concatenate([np.reshape(scores[name], -1) for name in free])
        eligible = np.concatenate([np.reshape(within[name], -1) for name in free])
        sizes = [np.size(scores[name]) for name in free]
        # By density, since 0.35 * 1 + 0.35 * 3 + 0.35 * 6 is below 0.35 * 10 and rounds otherwise.
        together: Counter[float] = Counter()
        for name, n in zip(free, sizes, strict=True):
            together[each[name]] += n
        k = int(np.floor(sum(d * n for d, n in together.items()) + 0.5))
        chosen = np.split(top_k(flat, k, eligible), np.cumsum(sizes)[:-1])
        mask |= {n: c.reshape(np.shape(scores[n])) for n, c in zip(free, chosen, strict=True)}
    return _checked({name: mask[name] for name in scores})


@SCOPES.register("layerwise")
def layerwise(scores: Scores, density: Density, within: Mask | None = None) -> Mask:
    """Each kernel its own ranking: round(density * size) are kept of every kernel.

    Args, Returns and Raises as for `global_`. The scope of Frankle and Carbin
    (2019) for LeNet and Conv-2/4/6 (section 2).

    >>> layerwise({"a": np.array([1.0, 5.0]), "b": np.array([2.0, 3.0])}, 0.5)
    {'a': array([0, 1], dtype=uint8), 'b': array([0, 1], dtype=uint8)}
    """
    each = _per_kernel(scores, density)
    return _checked(
        {
            name: top_k(s, count(each[name], np.size(s)), None if within is None else within[name])
            for name, s in scores.items()
        }
    )
