"""Claims made of others: conjunctions, over a grid of densities that was declared before.

A conjunction is shown by showing each of its components at the whole level (an intersection-union
test: Berger 1982); over the grid levels are Holm's (1979). A conjunction is refuted where one
component is shown to be false, at Holm's level over components and grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lth_tf.verdict.paired import Evidence

YES, NO, OPEN = "yes", "no", "not resolved"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed at one density, and how it was answered.

    Attributes:
      density: of the tickets.
      parts: component -> its evidence.
      answer: YES, NO or OPEN.
      level: at which the answer was given, or would have had to be.
      refuted: components that were shown to be false.
    """

    density: float
    parts: Mapping[str, Evidence]
    answer: str = OPEN
    level: float = 0.05
    refuted: tuple[str, ...] = ()

    @property
    def p_yes(self) -> float:
        """Of the conjunction: that of its weakest component."""
        return max(part.p_yes for part in self.parts.values())


def holm(p: Sequence[float], alpha: float) -> list[tuple[bool, float]]:
    """Returns of each p-value whether it is small enough, and the level that it was held against.

    The smallest is held against alpha / m, the next against alpha / (m - 1), and so on; behind the
    first that is too large none is small enough (Holm 1979).

    >>> holm([0.04, 0.01], 0.05)
    [(True, 0.05), (True, 0.025)]
    >>> holm([0.04, 0.03], 0.05)
    [(False, 0.05), (False, 0.025)]

    Args:
      p: values of one family.
      alpha: of the family.
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    found: list[tuple[bool, float]] = [(False, alpha)] * len(p)
    going = True
    for rank, i in enumerate(order):
        level = alpha / (len(p) - rank)
        going = going and p[i] <= level
        found[i] = going, level
    return found


def settle(claims: Sequence[Claim], alpha: float = 0.05) -> list[Claim]:
    """Returns the claims of a grid with their answers.

    Args:
      claims: of each density, with the evidence of every component.
      alpha: one-sided, of the whole grid: for all that is shown, and for all that is refuted.
    """
    shown = holm([claim.p_yes for claim in claims], alpha)
    each = [(i, name) for i, claim in enumerate(claims) for name in claim.parts]
    false = holm([claims[i].parts[name].p_no for i, name in each], alpha)
    found = []
    for i, claim in enumerate(claims):
        yes, level = shown[i]
        refuted = tuple(
            name for (j, name), (so, _) in zip(each, false, strict=True) if j == i and so
        )
        answer = YES if yes else NO if refuted else OPEN
        found.append(dataclasses.replace(claim, answer=answer, level=level, refuted=refuted))
    return found


def down_to(claims: Sequence[Claim], alpha: float = 0.05) -> list[Claim]:
    """Returns those from the highest density on that are shown one after the other, each at alpha.

    A fixed sequence, which needs no correction since it stops at the first that is not shown
    (Maurer et al. 1995).

    Args:
      claims: of a grid, in any order.
      alpha: one-sided.
    """
    found = []
    for claim in sorted(claims, key=lambda claim: -claim.density):
        if claim.p_yes > alpha:
            break
        found.append(claim)
    return found
