"""Budgets: how many weights are kept, of which kernels, and which these are.

What the scopes share. Whole numbers are exact: fractions are rounded once.
"""

from __future__ import annotations

import numbers
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

import numpy as np

from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores

Density = float | Mapping[str, float]


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
    return rank([scores], k, [eligible])[0]


def rank(
    scores: Sequence[np.ndarray], k: int, eligible: Sequence[np.ndarray | None]
) -> list[np.ndarray]:
    """Returns `top_k` over several arrays that compete with each other.

    Args:
      scores: float arrays.
      k: how many entries to keep in all.
      eligible: of each array, see `top_k`.

    Raises:
      UserError: scores that are not finite, or fewer than k eligible ones.
    """
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
    require_eligible(k, values.size, n)
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


def in_each(scores: Scores, budgets: Mapping[str, int], within: Mask | None) -> Mask:
    """Returns the mask of the highest scores of each kernel.

    Args:
      scores: kernel name -> array.
      budgets: kernel name -> how many.
      within: a mask that it is nested in, or None.
    """
    return {
        name: top_k(s, budgets[name], None if within is None else within[name])
        for name, s in scores.items()
    }


def per_kernel(scores: Scores, density: Density) -> dict[str, float]:
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


def bounds_of(
    scores: Scores, within: Mask | None, min_per_layer: int | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the fewest and the most weights that each kernel can keep.

    Args:
      scores: kernel name -> array.
      within: a mask that the new one is nested in, or None.
      min_per_layer: see `scopes`.

    Raises:
      UserError: min_per_layer is negative.
    """
    guard = min_per_layer or 0
    if guard < 0:
        raise UserError(f"min_per_layer {guard} is out of range; it is a number of weights, >= 0")
    most = {
        name: np.size(s) if within is None else int(np.count_nonzero(within[name]))
        for name, s in scores.items()
    }
    return {name: min(guard, n) for name, n in most.items()}, most


def budgets_of(
    scores: Scores, density: Density, within: Mask | None, min_per_layer: int | None
) -> tuple[int, dict[str, int], dict[str, int], Mask]:
    """Returns what the unprotected kernels share, and the mask of the protected ones.

    The former is their budget, and the fewest and the most of each kernel.

    Args:
      scores, within, min_per_layer: see `bounds_of`.
      density: for all kernels, or kernel name -> density.

    Raises:
      UserError: a budget that keeps nothing, or that the protected kernels exceed.
    """
    each = per_kernel(scores, density)
    sizes = {name: np.size(s) for name, s in scores.items()}
    # Exact, then rounded once: else k would depend on how the weights are divided into
    # kernels (0.35 * 1 + 0.35 * 3 + 0.35 * 6 is below 0.35 * 10), and might rise while the
    # densities fall.
    k = count(float(sum((Fraction(d) * sizes[n] for n, d in each.items()), Fraction())), 1)
    require_some(k, scores)
    least, most = bounds_of(scores, within, min_per_layer)
    whole = in_each({n: s for n, s in scores.items() if each[n] == 1}, sizes, within)
    for name in whole:
        k -= sizes.pop(name)
        del least[name], most[name]
    require_eligible(k, sum(most.values()), sum(sizes.values()))
    return k, least, most, whole


def require_some(k: int, scores: Scores) -> None:
    """Raises UserError where the budget is 0."""
    if k == 0:
        n = sum(np.size(s) for s in scores.values())
        raise UserError(f"none of the {n} weights would be kept; ask for a higher density")


def require_eligible(k: int, eligible: int, n: int) -> None:
    """Raises UserError where fewer weights are eligible than are to be kept.

    Args:
      k: the budget.
      eligible: how many there are.
      n: how many weights there are in all.
    """
    if k > eligible:
        raise UserError(
            f"cannot keep {k} weights: only {eligible} of {n} are eligible; "
            "a mask is never grown by pruning, so ask for a lower density"
        )


def too_few(k: int, takers: str, need: int, n: int) -> UserError:
    """Returns what is said where a budget is less than some kernels take by themselves.

    Args:
      k: the budget.
      takers: who takes, in words.
      need: what they take.
      n: how many weights there are in all.
    """
    # Rounded up: the number shown, typed in, must work.
    smallest = Context(prec=4, rounding=ROUND_CEILING).divide(Decimal(need), Decimal(n))
    return UserError(
        f"{k} weights are too few for {takers}; the smallest density possible is {smallest:f} "
        f"({need} of {n} unprotected weights)"
    )


def none_empty(mask: Mask, min_per_layer: int | None) -> Mask:
    """A kernel that lost everything cuts the network: never in silence."""
    empty = [name for name, m in mask.items() if not m.any()]
    if empty and min_per_layer is None:
        raise UserError(
            f"nothing would be left of {', '.join(empty)}: the network would be cut; ask for a "
            "higher density, use a scope that keeps a share of every kernel, or set min_per_layer "
            "(m: every kernel keeps m weights, 0: kernels may become empty)"
        )
    return mask


def shares_of(
    k: int, weight: Mapping[str, int], least: Mapping[str, int], most: Mapping[str, int]
) -> dict[str, int]:
    """Divides k in proportion to `weight`, each share between its bounds.

    Share l is t * weight_l, clipped to its bounds, with the t for which all add up to k. They
    are rounded down; the largest remainders, the earlier first, get what is left.
    Fractions, since a float sum could miss k.

    Args:
      k: what is divided.
      weight: kernel name -> its weight.
      least, most: kernel name -> its bounds.

    >>> shares_of(9, {"a": 9, "b": 2, "c": 2}, {"a": 0, "b": 0, "c": 0}, {"a": 4, "b": 9, "c": 9})
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
