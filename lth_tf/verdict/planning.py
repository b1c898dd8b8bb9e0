"""How many replicates would settle a claim."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy import stats

POWER = 0.8
_DRAWS = 20_000
MOST = 1000


def power(
    n: int, effects: Mapping[str, float], spreads: Mapping[str, float], level: float, seed: int = 0,
    correlation: float = 0.0,
) -> float:  # fmt: skip
    """Returns how likely n replicates show all components of a claim.

    Simulated are the t statistics of `paired.above`: mean and variance of n differences, whose true
    mean lies `effect` above the bound.

    Args:
      n: replicates, 2 or more.
      effects: component -> true mean above its bound, in the units of `spreads`.
      spreads: component -> standard deviation of the differences.
      level: that each component is held against.
      seed: of what is drawn.
      correlation: of the differences of any two components.
    """
    rng = np.random.default_rng([seed, n])
    shared = rng.standard_normal(_DRAWS)
    critical = stats.t.ppf(1 - level, n - 1)
    shown = np.ones(_DRAWS, bool)
    for name, effect in effects.items():
        own = rng.standard_normal(_DRAWS)
        z = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        chi = np.sqrt(rng.chisquare(n - 1, _DRAWS) / (n - 1))
        spread = spreads[name]
        if spread == 0:  # counted as signs
            shown &= (effect > 0) & (0.5**n <= level)
            continue
        shown &= (z + effect * math.sqrt(n) / spread) / chi > critical
    return float(shown.mean())


def needed(
    effects: Mapping[str, float], spreads: Mapping[str, float], level: float, seed: int = 0
) -> int | None:
    """Returns the smallest number of replicates with a power of POWER, None above MOST.

    Args:
      effects, spreads, level, seed: see `power`.
    """
    low, high = 1, 2
    while power(high, effects, spreads, level, seed) < POWER:
        low, high = high, 2 * high
        if high > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(middle, effects, spreads, level, seed) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def upper(spread: float, n: int, confidence: float = 0.8) -> float:
    """Returns what the true standard deviation is at most, so often, given that of n normal values.

    s sqrt((n - 1) / q), q the (1 - confidence) quantile of chi squared with n - 1 degrees.

    Args:
      spread: s.
      n: of how many.
      confidence: how often.
    """
    return spread * math.sqrt((n - 1) / float(stats.chi2.ppf(1 - confidence, n - 1)))


def replicates_for(
    effects: Mapping[str, float], spreads: Mapping[str, float], n: int, level: float, seed: int = 0
) -> tuple[int | None, int | None]:
    """Returns how many replicates a claim needs, by the spreads seen and by their upper limits.

    Args:
      effects: component -> true mean above its bound; stated, never the one that was observed.
      spreads: component -> standard deviation of the differences of n replicates.
      n: how many these are.
      level: that each component is held against.
      seed: of what is drawn.
    """
    high = {name: upper(s, n) for name, s in spreads.items()}
    return needed(effects, spreads, level, seed), needed(effects, high, level, seed)
