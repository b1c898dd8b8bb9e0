"""Branches: controls run off a ticket. A branch is a function Ticket -> Ticket."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from lth_tf import masks
from lth_tf.registry import Registry
from lth_tf.tickets import Ticket
from lth_tf.training import initial_weights

Branch = Callable[[Ticket], Ticket]
BRANCHES: Registry[Branch] = Registry("branch")

_REINIT = 11  # the stream of random numbers drawn from a ticket's seed


@BRANCHES.register("reinit")
def reinit(ticket: Ticket) -> Ticket:
    """The same mask, weights drawn anew (Frankle and Carbin 2019, section 2: random reinit).

    New weights have no past, so with --retrain=rewind they are trained from step 0.
    """
    seed = int(_rng(ticket, _REINIT).integers(2**31 - 1))
    shape = tuple(ticket.origin["input_shape"])
    weights, _ = initial_weights(ticket.spec, shape, ticket.origin["classes"], seed)
    start = 0 if ticket.spec.retrain == "rewind" else ticket.rewind_step
    return dataclasses.replace(
        ticket, weights=masks.apply(ticket.mask, weights), rewind_step=start
    )


def _rng(ticket: Ticket, stream: int) -> np.random.Generator:
    return np.random.default_rng([ticket.origin["seed"], stream, ticket.level])
