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
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores
from lth_tf.registry import Registry

Density = float | Mapping[str, float]
Scope = Callable[..., Mask]
# What others need to know: whether all kernels compete in one ranking.
SCOPES: Registry[Scope] = Registry("scope", pooled=False)


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
    return _rank([scores], k, [eligible])[0]


def _rank(
    scores: Sequence[np.ndarray], k: int, eligible: Sequence[np.ndarray | None]
) -> list[np.ndarray]:
    """`top_k` over several arrays that compete with each other."""
    flat = [np.asarray(s).reshape(-1) for s in scores]
    n = sum(s.size for s in flat)
    if bad := n - sum(int(np.count_nonzero(np.isfinite(s))) for s in flat):
        raise UserError(
            f"{bad} of {n} scores are NaN or infinite; "
            "no ranking is possible: look for a diverged training or an overflow in the scorer"
        )
    among = [None if e is None else np.reshape(e, -1) != 0 for e in eligible]
    pairs = list(zip(flat, among, strict=True))
    # For entries picked at random compress takes a quarter of the time of s[e].
    values = np.concatenate([s if e is None else np.compress(e, s) for s, e in pairs])
    _require_eligible(k, values.size, n)
    if k == 0:
        return [np.zeros(np.shape(s), np.uint8) for s in scores]
    # Everything above the k-th value is in; what equals it is taken in order.
    # A selection is ten times faster than the stable sort it stands for.
    values.partition(values.size - k)
    kth = values[values.size - k]
    out = [s > kth if e is None else (s > kth) & e for s, e in pairs]
    left = k - sum(int(np.count_nonzero(chosen)) for chosen in out)
    for chosen, (s, e) in zip(out, pairs, strict=True):
        if left == 0:
            break
        ties = np.flatnonzero(s == kth if e is None else (s == kth) & e)[:left]
        chosen[ties] = True
        left -= ties.size
    return [c.view(np.uint8).reshape(np.shape(s)) for c, s in zip(out, scores, strict=True)]


def _each(scores: Scores, budgets: Mapping[str, int], within: Mask | None) -> Mask:
    return {
        name: top_k(s, budgets[name], None if within is None else within[name])
        for name, s in scores.items()
    }


def _per_kernel(scores: Scores, density: Density) -> dict[str, float]:
    """Spells out a density for every kernel, checked."""
    if isinstance(density, Mapping):
        if unknown := sorted(set(density) - set(scores)):
            raise UserError(
                f"density given for unknown kernels {unknown}; the kernels are {list(scores)}"
            )
        if missing := [name for name in scores if name not in density]:
            raise UserError(f"no density given for the kernels {missing}; 1.0 protects a kernel")
        if wrong := [n for n in scores if not isinstance(density[n], numbers.Real)]:
            raise UserError(f"the density of {wrong[0]!r} must be a number")
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


def _bounds(
    scores: Scores, within: Mask | None, min_per_layer: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the fewest and the most weights that each kernel can keep."""
    guard = min_per_layer or 0
    if guard < 0:
        raise UserError(f"min_per_layer {guard} is out of range; it is a number of weights, >= 0")
    most = {
        name: np.size(s) if within is None else int(np.count_nonzero(within[name]))
        for name, s in scores.items()
    }
    return {name: min(guard, n) for name, n in most.items()}, most


def _budgets(
    scores: Scores, density: Density, within: Mask | None, min_per_layer: int | None
) -> tuple[int, dict[str, int], dict[str, int], Mask]:
    """Returns what the unprotected kernels share, and the mask of the protected ones.

    The former is their budget, and the fewest and the most of each kernel.
    """
    each = _per_kernel(scores, density)
    sizes = {name: np.size(s) for name, s in scores.items()}
    # Exact, then rounded once: else k would depend on how the weights are divided into
    # kernels (0.35 * 1 + 0.35 * 3 + 0.35 * 6 is below 0.35 * 10), and might rise while the
    # densities fall.
    k = count(float(sum((Fraction(d) * sizes[n] for n, d in each.items()), Fraction())), 1)
    _require_some(k, scores)
    least, most = _bounds(scores, within, min_per_layer)
    whole = _each({n: s for n, s in scores.items() if each[n] == 1}, sizes, within)
    for name in whole:
        k -= sizes.pop(name)
        del least[name], most[name]
    _require_eligible(k, sum(most.values()), sum(sizes.values()))
    return k, least, most, whole


def _require_some(k: int, scores: Scores) -> None:
    if k == 0:
        n = sum(np.size(s) for s in scores.values())
        raise UserError(f"none of the {n} weights would be kept; ask for a higher density")


def _require_eligible(k: int, eligible: int, n: int) -> None:
    if k > eligible:
        raise UserError(
            f"cannot keep {k} weights: only {eligible} of {n} are eligible; "
            "a mask is never grown by pruning, so ask for a lower density"
        )


def _too_few(k: int, takers: str, need: int, n: int) -> UserError:
    # Rounded up: the number shown, typed in, must work.
    smallest = Context(prec=4, rounding=ROUND_CEILING).divide(Decimal(need), Decimal(n))
    return UserError(
        f"{k} weights are too few for {takers}; the smallest density possible is {smallest:f} "
        f"({need} of {n} unprotected weights)"
    )


def _checked(mask: Mask, min_per_layer: int | None) -> Mask:
    """A kernel that lost everything cuts the network: never in silence."""
    empty = [name for name, m in mask.items() if not m.any()]
    if empty and min_per_layer is None:
        raise UserError(
            f"nothing would be left of {', '.join(empty)}: the network would be cut; ask for a "
            "higher density, use a scope that keeps a share of every kernel, or set min_per_layer "
            "(m: every kernel keeps m weights, 0: kernels may become empty)"
        )
    return mask


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
    k, least, most, mask = _budgets(scores, density, within, min_per_layer)
    names = list(most)
    ranked = [scores[name] for name in names]
    eligible = [None if within is None else within[name] for name in names]
    if k < (guarded := sum(least.values())):
        n = sum(np.size(s) for s in ranked)
        raise _too_few(k, f"min_per_layer {min_per_layer}", guarded, n)
    chosen = _rank(ranked, k, eligible) if names else []
    if any(np.count_nonzero(c) < least[n] for n, c in zip(names, chosen, strict=True)):
        first = [top_k(s, least[n], e) for n, s, e in zip(names, ranked, eligible, strict=True)]
        others = [
            f == 0 if e is None else (f == 0) & (e != 0)
            for f, e in zip(first, eligible, strict=True)
        ]
        rest = _rank(ranked, k - guarded, others)
        chosen = [f | r for f, r in zip(first, rest, strict=True)]
    mask |= dict(zip(names, chosen, strict=True))
    return _checked({name: mask[name] for name in scores}, min_per_layer)


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
    counts = {n: count(d, np.size(scores[n])) for n, d in _per_kernel(scores, density).items()}
    _require_some(sum(counts.values()), scores)
    least, _ = _bounds(scores, within, min_per_layer)
    budgets = {name: max(k, least[name]) for name, k in counts.items()}
    return _checked(_each(scores, budgets, within), min_per_layer)


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
    k, least, most, mask = _budgets(scores, density, within, min_per_layer)
    takers = [f"min_per_layer {min_per_layer}"] if min_per_layer else []
    if dense in most:
        least[dense] = most[dense]
        takers.insert(0, f"the first kernel {dense!r}, which stays dense ({most[dense]})")
    if k < (need := sum(least.values())):
        if min_per_layer is None:  # with which no share may be empty either
            possible = range(need, sum(most.values()))
            need += bisect_left(
                possible, True, key=lambda k: all(_shares(k, weight, least, most).values())
            )
        raise _too_few(k, " and ".join(takers), need, sum(np.size(scores[n]) for n in most))
    mask |= _each({n: scores[n] for n in most}, _shares(k, weight, least, most), within)
    return _checked({name: mask[name] for name in scores}, min_per_layer)


def _shares(
    k: int, weight: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """Divides k in proportion to `weight`, each share between its bounds.

    Share l is t * weight_l, clipped to its bounds, with the t for which all add up to k. They
    are rounded down; the largest remainders, the earlier first, get what is left.
    Fractions, since a float sum could miss k.

    >>> _shares(9, {"a": 9, "b": 2, "c": 2}, {"a": 0, "b": 0, "c": 0}, {"a": 4, "b": 9, "c": 9})
    {'a': 4, 'b': 3, 'c': 2}
    """

    def clipped(t: Fraction) -> dict[str, Fraction]:
        return {n: min(max(t * weight[n], Fraction(least[n])), Fraction(most[n])) for n in most}

    def total(t: Fraction) -> Fraction:
        return sum(clipped(t).values(), Fraction())

    # Between two of these points the sum is linear in t.
    points = sorted(
        {Fraction(0), *(Fraction(b[n], weight[n]) for n in most for b in (least, most))}
    )
    t = points[bisect_right(points, Fraction(k), key=total) - 1]
    if slope := sum(weight[n] for n in most if least[n] <= t * weight[n] < most[n]):
        t += (k - total(t)) / slope
    exact = clipped(t)
    shares = {n: int(x) for n, x in exact.items()}
    largest = sorted(exact, key=lambda n: shares[n] - exact[n])
    for n in largest[: k - sum(shares.values())]:
        shares[n] += 1
    return shares
