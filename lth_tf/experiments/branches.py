"""Branches: controls run off a ticket.

A branch is a function (`ticket`, `start`, `dataset`) -> ticket: the ticket that it is run off, the
weights, path -> array, that the ticket's were cut out of, and where examples to score on come from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError
from lth_tf.experiments import growing, picking
from lth_tf.models import initial_weights
from lth_tf.recipes import RECIPES, one_shot
from lth_tf.recipes.record import protected
from lth_tf.registry import Registry
from lth_tf.scopes import SCOPES, top_k
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket

Start = Mapping[str, np.ndarray]
Branch = Callable[[Ticket, Start, Dataset], Ticket]

# Streams of random numbers drawn from a ticket's seed.
_REINIT, _SHUFFLE, _DRAWN, _REUSED, _ORDER = 11, 12, 13, 14, 15


def _anything(spec: Spec) -> None:
    """For branches that every ticket can have."""


def _scores(spec: Spec) -> None:
    """For branches that rank initial weights anew."""
    recipe = RECIPES[spec.recipe]
    if not recipe.picks:
        others = " or ".join(r.tool for r in RECIPES.values() if r.picks)
        raise UserError(
            f"ranks initial weights anew: it needs tickets of {others}, not of {recipe.tool}, "
            "whose scores come from weights that were trained"
        )


def _signs(spec: Spec) -> None:
    """For branches that ask for the sign of scores."""
    _scores(spec)
    options = picking.options(spec, 0)
    if not SCORERS.about(spec.scorer).signed(options):
        variant = f" ({options['variant']})" if options.get("variant", "paper") != "paper" else ""
        signed = ", ".join(s for s in SCORERS if SCORERS.about(s).signed({}))
        raise UserError(
            f"changes nothing for scorer {spec.scorer}{variant}, whose scores are never negative; "
            f"it is for {signed}, and not for a variant that takes absolute values"
        )


# What others need to know: whether another seed gives another control, and (spec), which raises
# UserError, with the end of the sentence, where such tickets cannot have it.
BRANCHES: Registry[Branch] = Registry("branch", draws=False, needs=_anything)


def require(name: str, spec: Spec) -> None:
    """Raises UserError where a branch cannot be run off a spec's tickets, or changes nothing."""
    try:
        BRANCHES.about(name).needs(spec)
    except UserError as error:
        raise UserError(f"the branch {name!r} {error}") from None


def branch(ticket: Ticket, name: str, start: Start, dataset: Dataset) -> Ticket:
    """Returns a control of a ticket, marked as such.

    Args:
      ticket: what it is run off.
      name: a key of BRANCHES.
      start: path -> array, the weights that the ticket's were cut out of.
      dataset: where examples to score on come from.

    Raises:
      UserError: see `require`.
    """
    require(name, ticket.spec)
    control = growing.scaled(BRANCHES[name](ticket, start, dataset))
    return dataclasses.replace(control, origin={**control.origin, "arm": name})


@BRANCHES.register("reinit", draws=True)
def reinit(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same mask, weights drawn anew (Frankle and Carbin 2019, section 2: random reinit).

    New weights have no past, so with --retrain=rewind they are trained from step 0.
    """
    seed = int(_rng(ticket, _REINIT).integers(2**31 - 1))
    shape = tuple(ticket.origin["input_shape"])
    weights, _ = initial_weights(ticket.spec, shape, ticket.origin["classes"], seed)
    step = 0 if ticket.spec.retrain == "rewind" else ticket.rewind_step
    return dataclasses.replace(ticket, weights=masks.apply(ticket.mask, weights), rewind_step=step)


@BRANCHES.register("shuffle", draws=True)
def shuffle(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """As many weights of every kernel, but others (Frankle et al. 2021, their ablations).

    What a method loses by it, it knew about single weights; what is left, it knew about
    layers.
    """
    mask = masks.shuffle(ticket.mask, _rng(ticket, _SHUFFLE))
    return dataclasses.replace(ticket, mask=mask, weights=masks.apply(mask, start))


def _random(scope: str) -> Branch:
    def draw(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
        rng = _rng(ticket, _DRAWN)
        scores = {name: rng.random(m.shape) for name, m in ticket.mask.items()}
        share = masks.kept(ticket.mask) / masks.size(ticket.mask)
        whole = set(protected(ticket.spec.protect, ticket.mask))
        if whole:  # what is left for the others
            rest = [m for name, m in ticket.mask.items() if name not in whole]
            share = sum(map(np.count_nonzero, rest)) / sum(m.size for m in rest)
        density = {name: 1.0 if name in whole else share for name in scores}
        mask = SCOPES[scope](scores, density, min_per_layer=0)
        return dataclasses.replace(ticket, mask=mask, weights=masks.apply(mask, start))

    draw.__doc__ = (
        f"As many weights in all, drawn at random by scope {scope!r} (Liu et al. 2022, \"The "
        "unreasonable effectiveness of random pruning\")."
    )
    return draw


for _scope in ("erk", "global"):
    BRANCHES.register(f"random_{_scope}", draws=True)(_random(_scope))


@BRANCHES.register("random_uniform", draws=True)
def random_uniform(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """As many weights in all, drawn at random, the same share of every kernel.

    Also of the first one, which --scope=uniform leaves dense: few networks are sparse enough for
    that and have as many weights.
    """
    rng = _rng(ticket, _DRAWN)
    whole = set(protected(ticket.spec.protect, ticket.mask))
    sizes = {name: m.size for name, m in ticket.mask.items() if name not in whole}
    left = masks.kept({name: ticket.mask[name] for name in sizes})
    exact = {name: Fraction(left * size, sum(sizes.values())) for name, size in sizes.items()}
    counts = {name: math.floor(n) for name, n in exact.items()}
    rest = sorted(exact, key=lambda name: counts[name] - exact[name])  # largest remainders
    for name in rest[: left - sum(counts.values())]:
        counts[name] += 1
    mask = {
        name: top_k(rng.random(m.shape), counts.get(name, m.size))
        for name, m in ticket.mask.items()
    }
    return dataclasses.replace(ticket, mask=mask, weights=masks.apply(mask, start))


def _revalued(
    ticket: Ticket, start: Start, value: Callable[[np.random.Generator, Any, Any], Any]
) -> Ticket:
    """A ticket with the same mask whose kept weights are (rng, kernel's weights, kept ones)."""
    rng, weights = _rng(ticket, _REUSED), masks.apply(ticket.mask, start)
    for name, m in ticket.mask.items():
        kept = start[name][m != 0]
        weights[name] = np.zeros_like(start[name])
        weights[name][m != 0] = value(rng, start[name][start[name] != 0], kept)
    return dataclasses.replace(ticket, weights=weights)


@BRANCHES.register("reuse", draws=True)
def reuse(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same mask, each value drawn out of its kernel's (Zhou et al. 2019, section 4.1).

    What is lost by it beside the ticket hangs on single values, not on their distribution.
    """
    return _revalued(ticket, start, lambda rng, each, kept: rng.choice(each, kept.shape))


@BRANCHES.register("reuse_sign", draws=True)
def reuse_sign(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same, but each weight keeps its sign (Zhou et al. 2019, section 4.1)."""
    return _revalued(
        ticket, start,
        lambda rng, each, kept: np.copysign(np.abs(rng.choice(each, kept.shape)), kept),
    )  # fmt: skip


@BRANCHES.register("sign_only")
def sign_only(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same mask, each weight its sign times the deviation of its kernel's weights.

    Zhou et al. 2019, section 4.1: constant magnitudes, signs kept.
    """
    return _revalued(ticket, start, lambda rng, each, kept: np.copysign(each.std(), kept))


@BRANCHES.register("other_order", draws=True)
def other_order(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same ticket, trained on examples in another order (Frankle et al. 2020: its noise)."""
    seed = int(_rng(ticket, _ORDER).integers(2**31 - 1))
    return dataclasses.replace(ticket, origin={**ticket.origin, "order_seed": seed})


@BRANCHES.register("invert", draws=True, needs=_scores)
def invert(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The weights with the lowest scores (Frankle et al. 2021, their ablations)."""
    return _picked_again("invert", ticket, start, dataset, np.negative)


@BRANCHES.register("absolute", draws=True, needs=_signs)
def absolute(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The weights whose scores are furthest from zero (Frankle et al. 2021, their ablations)."""
    return _picked_again("absolute", ticket, start, dataset, np.abs)


def _picked_again(
    name: str, ticket: Ticket, start: Start, dataset: Dataset, transform: picking.Transform
) -> Ticket:
    require(name, ticket.spec)
    full = masks.ones({name: m.shape for name, m in ticket.mask.items()})
    dense = dataclasses.replace(ticket, mask=full, weights=dict(start), level=0)
    density = one_shot.densities(ticket.spec, {name: m.size for name, m in full.items()})
    return picking.pick(dense, dataset, density[ticket.level], ticket.level, transform)


def _rng(ticket: Ticket, stream: int) -> np.random.Generator:
    return np.random.default_rng([ticket.origin["seed"], stream, ticket.level])
