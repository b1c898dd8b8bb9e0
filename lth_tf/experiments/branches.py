"""Branches: controls run off a ticket.

A branch is a function (ticket, start, dataset) -> ticket; `start` are the weights, path ->
array, that the ticket's were cut out of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lth_tf import masks
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError
from lth_tf.experiments import picking
from lth_tf.models import initial_weights
from lth_tf.registry import Registry
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket

Start = Mapping[str, np.ndarray]
Branch = Callable[[Ticket, Start, Dataset], Ticket]
BRANCHES: Registry[Branch] = Registry("branch")

_REINIT, _SHUFFLE = 11, 12  # streams of random numbers drawn from a ticket's seed


@BRANCHES.register("reinit")
def reinit(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The same mask, weights drawn anew (Frankle and Carbin 2019, section 2: random reinit).

    New weights have no past, so with --retrain=rewind they are trained from step 0.
    """
    seed = int(_rng(ticket, _REINIT).integers(2**31 - 1))
    shape = tuple(ticket.origin["input_shape"])
    weights, _ = initial_weights(ticket.spec, shape, ticket.origin["classes"], seed)
    step = 0 if ticket.spec.retrain == "rewind" else ticket.rewind_step
    return dataclasses.replace(ticket, weights=masks.apply(ticket.mask, weights), rewind_step=step)


@BRANCHES.register("shuffle")
def shuffle(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """As many weights of every kernel, but others (Frankle et al. 2021, their ablations).

    What a method loses by it, it knew about single weights; what is left, it knew about
    layers.
    """
    mask = masks.shuffle(ticket.mask, _rng(ticket, _SHUFFLE))
    return dataclasses.replace(ticket, mask=mask, weights=masks.apply(mask, start))


@BRANCHES.register("invert")
def invert(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The weights with the lowest scores (Frankle et al. 2021, their ablations).

    Raises:
      UserError: see `require`.
    """
    require("invert", ticket.spec)
    return _picked_again(ticket, start, dataset, np.negative)


@BRANCHES.register("absolute")
def absolute(ticket: Ticket, start: Start, dataset: Dataset) -> Ticket:
    """The weights whose scores are the furthest from zero (Frankle et al. 2021, their ablations).

    Raises:
      UserError: see `require`.
    """
    require("absolute", ticket.spec)
    return _picked_again(ticket, start, dataset, np.abs)


def branch(ticket: Ticket, name: str, start: Mapping, dataset: Dataset) -> Ticket:
    """Returns the control `name` of a ticket, marked as such; see `branches`."""
    control = BRANCHES[name](ticket, start, dataset)
    return dataclasses.replace(control, origin={**control.origin, "arm": name})


def require(name: str, spec: Spec) -> None:
    """Raises UserError where a branch cannot be run off a spec's tickets, or changes nothing."""
    if name not in ("invert", "absolute"):
        return
    if spec.recipe != "one_shot":
        raise UserError(
            f"the branch {name!r} ranks initial weights anew: it needs tickets of lth-oneshot, not "
            "of lth-imp, whose scores come from weights that were trained"
        )
    if name == "absolute" and (spec.scorer != "grasp" or spec.grasp_variant == "absolute"):
        scorer = spec.scorer if spec.scorer != "grasp" else "grasp (absolute)"
        raise UserError(
            f"the branch 'absolute' changes nothing for scorer {scorer}, whose scores are never "
            "negative; it is for grasp with grasp_variant paper or official"
        )


def _picked_again(
    ticket: Ticket, start: Start, dataset: Dataset, transform: picking.Transform
) -> Ticket:
    full = masks.ones({name: m.shape for name, m in ticket.mask.items()})
    dense = dataclasses.replace(ticket, mask=full, weights=dict(start), level=0)
    density = picking.densities(ticket.spec, {name: m.size for name, m in full.items()})
    return picking.pick(dense, dataset, density[ticket.level], ticket.level, transform)


def _rng(ticket: Ticket, stream: int) -> np.random.Generator:
    return np.random.default_rng([ticket.origin["seed"], stream, ticket.level])
