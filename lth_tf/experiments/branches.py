"""Branches: controls run off a ticket.

A branch is a function (`ticket`, `start`, `dataset`) -> ticket: the ticket that it is run off, the
weights, path -> array, that the ticket's were cut out of, and where examples to score on come from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lth_tf import masks
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError
from lth_tf.experiments import growing, picking
from lth_tf.models import initial_weights
from lth_tf.recipes import RECIPES, one_shot
from lth_tf.registry import Registry
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket

Start = Mapping[str, np.ndarray]
Branch = Callable[[Ticket, Start, Dataset], Ticket]

_REINIT, _SHUFFLE = 11, 12  # streams of random numbers drawn from a ticket's seed


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
