"""What there is to know of a recipe, in one record."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lth_tf.errors import UserError
from lth_tf.registry import Registry


class Levels(NamedTuple):
    """How dense the tickets of a recipe are.

    Attributes:
      densities: for each level, 0 included, kernel name -> density.
      rates: kernel name -> fraction of its weights that each level removes, where it is the same
        for all levels; else empty.
    """

    densities: list[dict[str, float]]
    rates: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Where masks come from, and when; training is the same in every case.

    `spec` is a `Spec` of the recipe; `lab` a `Laboratory`, whose methods are the steps of all
    recipes.

    Attributes:
      tool: the console command.
      module: the module of lth_tf.tools that it is.
      help: half a sentence.
      fields: those fields of Spec that not every recipe has.
      levels: (spec, shapes, kinds) -> `Levels`; the latter two kernel name -> shape, and -> kind
        (see `pruning.kinds`). Raises UserError where a density cannot be reached.
      steps: (lab, replicate): what is done for one replicate, level after level.
      asked: (spec) -> densities asked for, of which the last is the last level's; empty where
        they follow from a number of levels.
      target: the field whose value, if it is the only one, is the last level's density.
      method: (spec) -> what it is called beside other methods.
      has_dense: (spec) -> whether level 0, the dense network, is trained.
      says: (spec, prunings, rounds of scoring) -> a sentence for the plan, or None.
      picks: whether masks come from scores of the weights at initialisation.
      chained: whether a ticket comes of the training of the level before, and costs that, too.
      moves: (spec) -> whether masks move while tickets are trained.
      begins: (spec, densities that training ends with) -> those that it begins with.
      settled: (spec) -> the step from which on a ticket's density, and so its evaluations, count.
      defaults: field -> what its flag has as default, where that is not Spec's.
    """

    tool: str
    module: str
    help: str
    fields: tuple[str, ...]
    levels: Callable[[Any, Mapping[str, tuple[int, ...]], Mapping[str, str]], Levels]
    steps: Callable[[Any, int], None]
    asked: Callable[[Any], Sequence[float]]
    target: str
    method: Callable[[Any], str]
    has_dense: Callable[[Any], bool] = lambda spec: True
    says: Callable[[Any, int, int], str | None] = lambda spec, levels, rounds: None
    picks: bool = False
    chained: bool = False
    moves: Callable[[Any], bool] = lambda spec: False
    begins: Callable[[Any, Any], Any] = lambda spec, densities: densities
    settled: Callable[[Any], int] = lambda spec: 0
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RECIPES: Registry[Recipe] = Registry("recipe")


def protected(patterns: Sequence[str], names: Iterable[str]) -> list[str]:
    """Returns which kernels are kept out of pruning: those that fit a name or pattern.

    Raises:
      UserError: a pattern fits no kernel.

    >>> protected(["*shortcut*"], ["conv/kernel", "shortcut/kernel"])
    ['shortcut/kernel']
    """
    names = list(names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"protect {pattern!r} fits no kernel; the kernels are {', '.join(names)}"
            )
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
