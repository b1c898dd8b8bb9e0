"""Tests of one claim on paired replicates: how strong is what speaks for it, and against it.

Dense network, ticket and control of a replicate share what the control does not change (the
initialisation, the order of examples), so what is tested is their difference, replicate by
replicate. All tests are one-sided; a claim and its opposite are tested apart, so that failing to
show one shows nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What replicates say of a claim.

    Attributes:
      n: how many there are.
      estimate: the mean of the differences, NaN where some of them are not known.
      low, high: an interval that has the true mean in it with 1 - 2 alpha, NaN where none is known.
      spread: the standard deviation of the differences, NaN of a single one.
      p_yes: how likely so much would speak for the claim if it did not hold.
      p_no: how likely so much would speak against it if it held.
      why: what there is to say besides, or ''.
    """

    n: int
    estimate: float
    low: float
    high: float
    spread: float
    p_yes: float
    p_no: float
    why: str = ""


def above(differences: Sequence[float], bound: float, alpha: float = 0.05) -> Evidence:
    """Returns the evidence that a mean difference is above a bound: Student's test on pairs.

    With bound -m it is non-inferiority by a margin m, with bound m superiority by more than it.
    Equal differences, of which Student's test makes 0 / 0, are counted as signs: n on one side of
    the bound have p = 2^-n.

    Args:
      differences: one for each replicate, larger is better.
      bound: that the mean is claimed to be above.
      alpha: of the interval, one-sided.
    """
    d = np.asarray(differences, np.float64)
    n = len(d)
    mean = float(d.mean()) if n else math.nan
    if n < 2:
        return Evidence(n, mean, math.nan, math.nan, math.nan, 1.0, 1.0, "no interval from one")
    spread = float(d.std(ddof=1))
    if spread <= 1e-12 * max(abs(mean), abs(bound), 1e-300):
        p_yes, p_no = (0.5**n if so else 1.0 for so in (mean > bound, mean < bound))
        why = "equal differences, counted as signs"
        return Evidence(n, mean, mean, mean, 0.0, p_yes, p_no, why)
    error = spread / math.sqrt(n)
    t = (mean - bound) / error
    half = float(stats.t.ppf(1 - alpha, n - 1)) * error
    return Evidence(
        n, mean, mean - half, mean + half, spread,
        float(stats.t.sf(t, n - 1)), float(stats.t.cdf(t, n - 1)),
    )  # fmt: skip


def no_later(
    mine: Sequence[float], others: Sequence[float], mine_censored: Sequence[bool] = (),
    others_censored: Sequence[bool] = (), ratio: float = 1.1, alpha: float = 0.05,
) -> Evidence:  # fmt: skip
    """Returns the evidence that a step comes no later than `ratio` times another, on log ratios.

    With ratio 1 it is that it comes sooner. A step that is only known to lie at or behind the last
    evaluation is censored. Where there is one, pairs are counted by the side of the bound that they
    are known to be on (a sign test); those of which neither is known count against either claim.

    Args:
      mine: the step of each replicate whose being early is claimed.
      others: the step that it is compared with.
      mine_censored, others_censored: whether each is censored; none by default.
      ratio: the bound.
      alpha: of the interval, one-sided.
    """
    a, b = (np.maximum(np.asarray(x, np.float64), 1.0) for x in (mine, others))
    n = len(a)
    behind = np.asarray(mine_censored if len(mine_censored) else [False] * n, bool)
    later = np.asarray(others_censored if len(others_censored) else [False] * n, bool)
    logs, bound = np.log(a / b), math.log(ratio)
    if not behind.any() and not later.any():
        found = above((-logs).tolist(), -bound, alpha)
        return dataclasses.replace(
            found, estimate=-found.estimate, low=-found.high, high=-found.low
        )
    sure = int(np.sum(~behind & (logs < bound)))  # of `others` the true step is no earlier
    not_so = int(np.sum(~later & (logs > bound)))
    open_ended = int((behind | later).sum())
    why = f"{sure} of {n} known to be no later, {not_so} to be later; {open_ended} "
    why += "with a minimum at the last evaluation"
    p_yes, p_no = (float(stats.binom.sf(k - 1, n, 0.5)) for k in (sure, not_so))
    return Evidence(n, math.nan, math.nan, math.nan, math.nan, p_yes, p_no, why)


def reachable(n: int, level: float) -> bool:
    """Says whether so many signs can reach a level at all: 2^-n <= level."""
    return 0.5**n <= level
