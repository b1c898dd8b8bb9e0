"""Scopes turn scores into masks: which weights compete with each other, and for what budget.

A scope is a function (scores, density, within, *, min_per_layer) -> mask:

    global     one ranking over all kernels for a budget of k = round(density * N)
    layerwise  a ranking in each kernel for a budget round(density * size) of its own
    uniform    the same, but the first kernel stays dense: one density for the rest, k in all
    erk        the same, but density ~ sum of the kernel's dims / their product, k in all

N is the number of prunable weights; round takes halves up. Equal scores are broken by
position, the earlier entry (in kernel order, row-major) wins, so that the number of kept
weights is exact whatever the scores are.

`scores` are arrays by kernel name, higher = keep. `density` is one number for all kernels or
a dict kernel name -> number, where 1.0 protects a kernel: it is kept whole and takes no part
in the rest. With `within` only weights that this mask keeps can be kept, so the new mask is
nested in it; densities are always fractions of whole kernels, not of what `within` keeps.
Pruning in rounds, each within the mask of the last, never runs out of weights while densities
fall.

`min_per_layer` says what may happen to a kernel whose scores are low. None: a kernel left
empty is an error. 0: it may be left empty. m: it keeps at least its m highest scores, or
all that it has where these are fewer; they come out of the same k (layerwise: in
addition to it). A density that keeps no weight at all is always an error.
"""

from __future__ import annotations

import functools
import numbers
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lth_tf.budgets import (
    Density,
    bounds_of,
    budgets_of,
    count,
    in_each,
    none_empty,
    per_kernel,
    rank,
    require_some,
    shares_of,
    too_few,
    top_k,
)
from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores
from lth_tf.registry import Registry

Scope = Callable[..., Mask]
# What others need to know: whether all kernels compete in one ranking.
SCOPES: Registry[Scope] = Registry("scope", pooled=False)

__all__ = ["SCOPES", "Density", "Scope", "count", "top_k"]


def _given(scope: Scope) -> Scope:
    """A scope that looks at its arguments first: what does not fit must not be broadcast."""

    @functools.wraps(scope)
    def checked(
        scores: Scores,
        density: Density,
        within: Mask | None = None,
        *,
        min_per_layer: int | None = None,
    ) -> Mask:
        _require_arrays(scores, "scores")
        if not isinstance(density, (Mapping, numbers.Real)):
            raise UserError(
                f"density must be a number or a dict of kernel name -> number, not {density!r}"
            )
        if min_per_layer is not None and not isinstance(min_per_layer, numbers.Integral):
            raise UserError(f"min_per_layer must be a whole number or None, not {min_per_layer!r}")
        if within is not None:
            _require_arrays(within, "within")
            if set(within) != set(scores):
                raise UserError(
                    f"within has the kernels {list(within)}, the scores have {list(scores)}"
                )
            for name, s in scores.items():
                if np.shape(within[name]) != np.shape(s):
                    raise UserError(
                        f"within has shape {np.shape(within[name])} for {name!r}, the scores "
                        f"have {np.shape(s)}"
                    )
        return scope(scores, density, within, min_per_layer=min_per_layer)

    return checked


def _require_arrays(given: Any, what: str) -> None:
    """Raises UserError unless it is a dict of kernel name -> array of numbers."""
    if not isinstance(given, Mapping):
        hint = "; of a ticket give its .mask" if hasattr(given, "mask") else ""
        raise UserError(
            f"{what} must be a dict of kernel name -> array, not {type(given).__name__}{hint}"
        )
    for name, each in given.items():
        if np.asarray(each).dtype.kind not in "biuf":
            raise UserError(f"{what} of {name!r} must be an array of numbers")


@SCOPES.register("global", pooled=True)
@_given
def global_(
    scores: Scores,
    density: Density,
    within: Mask | None = None,
    *,
    min_per_layer: int | None = None,
) -> Mask:
    """One ranking over all kernels: the k highest scores of the whole network are kept.

    k = round(sum over kernels of density * size). With a dict of densities, kernels at 1.0
    stay out of the ranking and are kept whole; the others share the sum of their budgets.
    With min_per_layer = m, the m highest scores of every kernel are kept first, then the
    highest of all the rest, k together.

    Args:
      scores: kernel name -> float array, higher = keep.
      density: fraction to keep, or kernel name -> fraction.
      within: only weights kept by this mask compete.
      min_per_layer: None refuses to empty a kernel, 0 allows it, m >= 1 keeps at least m
        weights of every kernel, or all it has if fewer.

    Returns:
      Kernel name -> uint8 array; exactly k ones.

    Raises:
      UserError: a density or min_per_layer out of range, scores that cannot be ranked,
        more weights asked for than `within` has, fewer than min_per_layer takes, none at
        all, or a kernel left empty.

    >>> scores = {"a": np.array([1.0, 5.0]), "b": np.array([6.0, 7.0, 8.0, 9.0])}
    >>> global_(scores, 0.84)
    {'a': array([0, 1], dtype=uint8), 'b': array([1, 1, 1, 1], dtype=uint8)}
    >>> global_(scores, 0.5, min_per_layer=1)
    {'a': array([0, 1], dtype=uint8), 'b': array([0, 0, 1, 1], dtype=uint8)}
    """
    k, least, most, mask = budgets_of(scores, density, within, min_per_layer)
    names = list(most)
    ranked = [scores[name] for name in names]
    eligible = [None if within is None else within[name] for name in names]
    if k < (guarded := sum(least.values())):
        n = sum(np.size(s) for s in ranked)
        raise too_few(k, f"min_per_layer {min_per_layer}", guarded, n)
    chosen = rank(ranked, k, eligible) if names else []
    if any(np.count_nonzero(c) < least[n] for n, c in zip(names, chosen, strict=True)):
        first = [top_k(s, least[n], e) for n, s, e in zip(names, ranked, eligible, strict=True)]
        others = [
            f == 0 if e is None else (f == 0) & (e != 0)
            for f, e in zip(first, eligible, strict=True)
        ]
        rest = rank(ranked, k - guarded, others)
        chosen = [f | r for f, r in zip(first, rest, strict=True)]
    mask |= dict(zip(names, chosen, strict=True))
    return none_empty({name: mask[name] for name in scores}, min_per_layer)


@SCOPES.register("layerwise")
@_given
def layerwise(
    scores: Scores,
    density: Density,
    within: Mask | None = None,
    *,
    min_per_layer: int | None = None,
) -> Mask:
    """Each kernel its own ranking: round(density * size) are kept of every kernel.

    A count below min_per_layer is raised to it, so that the total may be larger than
    the density says: here the budget is each kernel's own, and no other pays for it.

    Args, Returns and Raises as for `global_`. The scope of Frankle and Carbin
    (2019) for LeNet and Conv-2/4/6 (section 2).

    >>> layerwise({"a": np.array([1.0, 5.0]), "b": np.array([2.0, 3.0])}, 0.5)
    {'a': array([0, 1], dtype=uint8), 'b': array([0, 1], dtype=uint8)}
    """
    counts = {n: count(d, np.size(scores[n])) for n, d in per_kernel(scores, density).items()}
    require_some(sum(counts.values()), scores)
    least, _ = bounds_of(scores, within, min_per_layer)
    budgets = {name: max(k, least[name]) for name, k in counts.items()}
    return none_empty(in_each(scores, budgets, within), min_per_layer)


@SCOPES.register("uniform")
@_given
def uniform(
    scores: Scores,
    density: Density,
    within: Mask | None = None,
    *,
    min_per_layer: int | None = None,
) -> Mask:
    """The first kernel stays dense; the others share the rest at one equal density.

    With k = round(sum of density * size), kernel l > 1 has the density (k - n_1) / (n_2 +
    n_3 + ...) and is ranked by itself. Whole numbers by largest remainders, so that exactly
    k are kept. Kernels with fewer eligible weights keep all of them, and what they cannot take
    goes to the others. If the first kernel is protected, no other stays dense instead.

    Args, Returns and Raises as for `global_`; also UserError, with the smallest density
    possible, if the first kernel alone has more than k weights. Evci et al. (2020), "Rigging the
    lottery", section 3.

    >>> scores = {"a": np.zeros(2), "b": np.arange(4.0), "c": np.arange(8.0)}
    >>> {name: int(m.sum()) for name, m in uniform(scores, 5 / 14).items()}
    {'a': 2, 'b': 1, 'c': 2}
    """
    first = next(iter(scores), None)
    weight = {name: np.size(s) for name, s in scores.items()}
    return _spread(scores, density, within, min_per_layer, weight, first)


@SCOPES.register("erk")
@_given
def erk(
    scores: Scores,
    density: Density,
    within: Mask | None = None,
    *,
    min_per_layer: int | None = None,
) -> Mask:
    """Erdos-Renyi-Kernel: density_l = eps * (sum of kernel l's dims) / (their product).

    The dims are all of the kernel's: height, width, inputs, outputs; for a dense layer it
    is Erdos-Renyi. A kernel whose density would be above 1 is dense, the others share what
    it cannot take (eps grows until none is above 1), and are each ranked by itself. eps is
    such that k = round(sum of density * size) are kept; whole numbers by largest remainders, so
    that it is exactly k. With `within`, all eligible weights take the part of dense.

    Args, Returns and Raises as for `global_`. Mocanu et al. (2018) for Erdos-Renyi; Evci et
    al. (2020), "Rigging the lottery", section 3, for the kernel's dims; the
    redistribution is that of their published code.

    >>> scores = {"a": np.ones((2, 3)), "b": np.ones((6, 5)), "c": np.ones((8, 14))}
    >>> {name: int(m.sum()) for name, m in erk(scores, 46 / 148).items()}
    {'a': 6, 'b': 13, 'c': 27}
    """
    weight = {name: sum(np.shape(s)) for name, s in scores.items()}
    return _spread(scores, density, within, min_per_layer, weight)


def _spread(
    scores: Scores,
    density: Density,
    within: Mask | None,
    min_per_layer: int | None,
    weight: Mapping[str, int],
    dense: str | None = None,
) -> Mask:
    """Budgets in proportion to `weight`, but `dense` stays whole; a ranking in each kernel."""
    k, least, most, mask = budgets_of(scores, density, within, min_per_layer)
    takers = [f"min_per_layer {min_per_layer}"] if min_per_layer else []
    if dense in most:
        least[dense] = most[dense]
        takers.insert(0, f"the first kernel {dense!r}, which stays dense ({most[dense]})")
    if k < (need := sum(least.values())):
        if min_per_layer is None:  # with which no share may be empty either
            possible = range(need, sum(most.values()))
            need += bisect_left(
                possible, True, key=lambda k: all(shares_of(k, weight, least, most).values())
            )
        raise too_few(k, " and ".join(takers), need, sum(np.size(scores[n]) for n in most))
    mask |= in_each({n: scores[n] for n in most}, shares_of(k, weight, least, most), within)
    return none_empty({name: mask[name] for name in scores}, min_per_layer)
