"""Sparse training: the masks that it begins with, and what moves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from lth_tf import masks, models
from lth_tf.callbacks.moving import Mover
from lth_tf.masks import Mask
from lth_tf.recipes import RECIPES, sparse
from lth_tf.recipes.sparse import course
from lth_tf.scopes import SCOPES
from lth_tf.tickets import Ticket

_SOWN, _DRAWN = 31, 32  # streams of random numbers drawn from a ticket's seed


def sown(dense: Ticket, density: Mapping[str, float], level: int) -> Ticket:
    """Returns a ticket whose mask is drawn at random, of the density that training begins with.

    Args:
      dense: the level-0 ticket.
      density: kernel name -> fraction kept in the end.
      level: the ticket's number.
    """
    mask = _drawn(dense, sparse.begins(dense.spec, density), level)
    weights = masks.apply(mask, dense.weights)
    return dataclasses.replace(dense, mask=mask, weights=weights, level=level)


def _drawn(ticket: Ticket, density: Mapping[str, float], level: int) -> Mask:
    rng = np.random.default_rng([ticket.origin["seed"], _SOWN, level])
    scores = {name: rng.random(m.shape) for name, m in ticket.mask.items()}
    if all(d == 1 for d in density.values()):
        return masks.ones({name: m.shape for name, m in ticket.mask.items()})
    spec = ticket.spec
    return SCOPES[spec.scope](scores, density, min_per_layer=spec.min_per_layer)


def mover(ticket: Ticket, blueprint: models.Blueprint) -> Mover:
    """Returns what moves a ticket's mask in its training.

    Args:
      ticket: see `sown`.
      blueprint: of its network.
    """
    spec, seed = ticket.spec, ticket.origin["seed"]
    shapes = {name: m.shape for name, m in ticket.mask.items()}
    kinds = dict.fromkeys(shapes, "")
    density = RECIPES[spec.recipe].levels(spec, shapes, kinds).densities[ticket.level]
    final = ticket.mask
    if sparse.initial_density(spec) is not None:
        final = _drawn(ticket, density, ticket.level)
    drawn = None
    if spec.grow_init == "random":
        drawn = blueprint.initial(int(np.random.default_rng([seed, _DRAWN]).integers(2**31 - 1)))
    return Mover(
        course(spec), {name: int(m.sum()) for name, m in final.items()}, drawn=drawn,
        fresh=spec.regrown == "new", trains=spec.update_trains,
        held_out=spec.grow_batch == "held_out", seed=seed,
        measures="gradient_flow" in spec.measure,
    )  # fmt: skip


def scaled(ticket: Ticket) -> Ticket:
    """Returns a ticket whose start weights are those of an initialisation that knows the mask.

    A weight of input i and output j is multiplied by sqrt(n / k). With `sparse_init` = 'fan_in', n
    is the number of inputs of the kernel and k that of those that j keeps; with 'fan_avg' the sum
    of inputs and outputs, and of those that j and i keep; with 'layer' of weights, and of those
    that the kernel keeps. So its variance is what the initialisation gives a dense layer with as
    many connections. Evci et al. 2022, section 3.

    Args:
      ticket: with weights as initialised.
    """
    kind = ticket.spec.sparse_init
    if kind == "none":
        return ticket
    weights = dict(ticket.weights)
    for name, m in ticket.mask.items():
        kept = np.reshape(m != 0, (-1, *m.shape[-2:])).sum(0)  # of each input and output
        window = m.size // kept.size
        inputs, outputs = kept.sum(0), kept.sum(1)[:, None]
        if kind == "layer":
            n, k = m.size, kept.sum()
        elif kind == "fan_in":
            n, k = window * kept.shape[0], inputs
        else:
            n, k = window * sum(kept.shape), inputs + outputs
        factor = np.sqrt(n / np.maximum(1, k))
        weights[name] = (weights[name] * factor).astype(weights[name].dtype)
    return dataclasses.replace(ticket, weights=weights)
