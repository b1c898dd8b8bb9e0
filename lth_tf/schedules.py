"""Numbers over time: the density of each level, the learning rate of each step.

A learning-rate schedule is a function (steps, total, *, drops, factor) -> factors of the peak
rate, float[n]: `steps` are numbers of steps, int[n], out of `total`; `drops` are those at which the
rate falls to `factor` of what it was, in schedules that drop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.registry import Registry


def level_densities(
    sizes: Mapping[str, int],
    rates: Mapping[str, float],
    *,
    levels: int | None = None,
    target_density: float | None = None,
    one_shot: bool = False,
) -> list[dict[str, float]]:
    """Returns for every level, 0 included, the density of every kernel.

    A kernel with prune rate p has density (1 - p)^l at level l (Frankle and Carbin
    2019, section 1). With a target, l need not be whole at the last level: it is the
    one l at which the network as a whole has the target density.

    Args:
      sizes: kernel name -> number of weights.
      rates: kernel name -> fraction removed per level, 0 (protected) to below 1.
      levels: the number of prunings; or
      target_density: the density of the whole network at the last level.
      one_shot: go to the last level in one pruning.

    Raises:
      UserError: neither or both ends are given, or the target cannot be reached.

    >>> level_densities({"a": 80, "b": 20}, {"a": 0.5, "b": 0.0}, levels=2)
    [{'a': 1.0, 'b': 1.0}, {'a': 0.5, 'b': 1.0}, {'a': 0.25, 'b': 1.0}]
    >>> [round(d["a"], 3) for d in
    ...  level_densities({"a": 80, "b": 20}, {"a": 0.5, "b": 0.0}, target_density=0.5)]
    [1.0, 0.5, 0.375]
    """
    if (levels is None) == (target_density is None):
        raise UserError("give either levels or target_density, not both and not neither")

    def at(level: float) -> dict[str, float]:
        return {name: (1 - rates[name]) ** level for name in sizes}

    def whole(level: float) -> float:
        each = at(level)
        return sum(each[name] * n for name, n in sizes.items()) / sum(sizes.values())

    if target_density is None:
        last = float(levels or 0)
    else:
        floor = sum(n for name, n in sizes.items() if rates[name] == 0) / sum(sizes.values())
        if not floor < target_density < 1:
            raise UserError(
                f"target_density {target_density} cannot be reached: it must be below 1 and above "
                f"{floor:.4g}, the share of the kernels whose prune fraction is 0"
            )
        high = 1.0
        while whole(high) > target_density:
            high *= 2
        import scipy.optimize  # half a second, for this alone

        last = scipy.optimize.brentq(lambda x: whole(x) - target_density, 0.0, high, xtol=1e-13)
        if abs(last - round(last)) < 1e-9:  # 0.8 ** 3 is not quite 0.512
            last = float(round(last))
    if one_shot:
        steps = [0.0, last] if last else [0.0]
    else:
        steps = [*map(float, range(int(np.ceil(last)))), last]
    return [at(level) for level in steps]


def next_boundary(
    step: int, stop: int, *, every: Iterable[int] = (), at: Iterable[int | None] = ()
) -> int:
    """Returns the first step after `step` at which something is due, at most `stop`.

    Args:
      step: where a training is.
      stop: where it ends.
      every: what is due at multiples of a number of steps; 0 is never.
      at: steps at which something is due once; None, and steps that are past, are not.

    >>> next_boundary(7, 100, every=[5, 0], at=[9, None, 3])
    9
    >>> next_boundary(9, 100, every=[5, 0], at=[9, None, 3])
    10
    """
    multiples = ((step // n + 1) * n for n in every if n)
    return min([stop, *multiples, *(s for s in at if s is not None and s > step)])


ROUND_SCHEDULES = ("exponential", "linear")


def round_densities(
    density: float | Mapping[str, float], rounds: int, schedule: str = "exponential"
) -> list[Any]:
    """Returns the density after each round of pruning, the last one `density` itself.

    Round r of n: d^(r / n) (exponential; Tanaka et al. 2020, algorithm 1) or
    1 - (1 - d) r / n (linear).

    Args:
      density: of the last round, or kernel name -> density.
      rounds: how many, at least 1.
      schedule: 'exponential' or 'linear'.

    Raises:
      UserError: less than one round, or an unknown schedule.

    >>> round_densities(0.25, 2)
    [0.5, 0.25]
    >>> round_densities({"a": 0.5, "b": 1.0}, 2, "linear")
    [{'a': 0.75, 'b': 1.0}, {'a': 0.5, 'b': 1.0}]
    """
    if not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds {rounds} is out of range; it must be a whole number, at least 1")
    if schedule not in ROUND_SCHEDULES:
        raise UserError(
            f"unknown round_schedule {schedule!r}; there are: {', '.join(ROUND_SCHEDULES)}"
        )

    def at(d: float, r: int) -> float:
        if r == rounds:
            return d
        return d ** (r / rounds) if schedule == "exponential" else 1 - (1 - d) * r / rounds

    each = range(1, rounds + 1)
    if isinstance(density, Mapping):
        return [{name: at(d, r) for name, d in density.items()} for r in each]
    return [at(density, r) for r in each]


LearningRate = Callable[..., np.ndarray]
LR_SCHEDULES: Registry[LearningRate] = Registry("learning-rate schedule")


@LR_SCHEDULES.register("constant")
def constant(steps: np.ndarray, total: int, *, drops: Sequence[int], factor: float) -> np.ndarray:
    """Returns 1 at every step."""
    return np.ones(steps.shape)


@LR_SCHEDULES.register("steps")
def step_drops(steps: np.ndarray, total: int, *, drops: Sequence[int], factor: float) -> np.ndarray:
    """Returns factor^(number of drops passed): the rate falls at each step of `drops`."""
    return factor ** np.searchsorted(np.sort(np.asarray(drops, int)), steps, side="right")


@LR_SCHEDULES.register("cosine")
def cosine(steps: np.ndarray, total: int, *, drops: Sequence[int], factor: float) -> np.ndarray:
    """Returns (1 + cos(pi t / T)) / 2 (Loshchilov and Hutter 2017, eq. 5, no restarts)."""
    return (1 + np.cos(np.pi * steps / total)) / 2


def learning_rates(
    name: str,
    base: float,
    total: int,
    *,
    drops: Sequence[int] = (),
    factor: float = 0.1,
    warmup: int = 0,
) -> np.ndarray:
    """Returns the learning rate of each of `total` steps, float64[total].

    During the first `warmup` steps it rises linearly, from base / warmup at step 0
    to the full rate (as Frankle and Carbin 2019, section 4, warm up).

    Args:
      name: a key of LR_SCHEDULES.
      base: the peak rate.
      total: the number of steps.
      drops, factor: for schedules that drop; see the module.
      warmup: the number of steps until the full rate.

    >>> learning_rates("steps", 1.0, 5, drops=[3], warmup=2)
    array([0.5, 1. , 1. , 0.1, 0.1])
    """
    steps = np.arange(total)
    values = base * LR_SCHEDULES[name](steps, total, drops=drops, factor=factor)
    if warmup:
        values = values * np.minimum(1.0, (steps + 1) / warmup)
    return values
