"""Tickets out of tickets: what all keep, or what any of them does."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import edge, masks, storage
from lth_tf.analysis.overlap import require_alike
from lth_tf.errors import UserError
from lth_tf.models import initial_weights
from lth_tf.tickets import Ticket

HOW = {"union": np.bitwise_or, "intersect": np.bitwise_and}


def combined(how: str, tickets: Sequence[Ticket]) -> Ticket:
    """Returns a ticket that keeps what any of several keeps ('union') or all do ('intersect').

    It starts from the initial weights of the first, which its seed draws again: those that one of
    them prunes are not in its file.

    Args:
      how: a key of HOW.
      tickets: of one network with the same initial weights, trained from step 0.

    Raises:
      UserError: fewer than two, or of others; or nothing is left.
    """
    if len(tickets) < 2:
        raise UserError(f"{how} takes two tickets or more, not {len(tickets)}")
    first = tickets[0]
    for other in tickets[1:]:
        require_alike(first.mask, other.mask)
        if other.origin.get("initial_sha256") != first.origin.get("initial_sha256"):
            raise UserError(
                f"{how} is for tickets with the same initial weights; these have seeds "
                f"{first.origin.get('seed')} and {other.origin.get('seed')}"
            )
    if late := [t.rewind_step for t in tickets if t.rewind_step]:
        raise UserError(
            f"{how} is for tickets that are trained from step 0; one starts at step {late[0]}, "
            "and the weights of that step are not in its file"
        )
    mask = {
        name: functools.reduce(HOW[how], [t.mask[name] for t in tickets]) for name in first.mask
    }
    if not masks.kept(mask):
        raise UserError("these tickets have no weight in common")
    shape, seed = tuple(first.origin["input_shape"]), first.origin["seed"]
    weights, _ = initial_weights(first.spec, shape, first.origin["classes"], seed)
    if storage.digest(weights) != first.origin.get("initial_sha256"):
        raise UserError(
            "the initial weights that the ticket's seed draws are not those that it was made of: "
            "another version of TensorFlow drew them"
        )
    origin = {**first.origin, "arm": how}
    weights = masks.apply(mask, weights)
    return dataclasses.replace(first, mask=mask, weights=weights, origin=origin)


def nested(tickets: Sequence[Ticket]) -> list[tuple[int, int]]:
    """Returns the pairs of levels of which the later one keeps weights that the earlier has pruned.

    Args:
      tickets: of one replicate, in the order of their levels.
    """
    return [
        (a.level, b.level)
        for a, b in zip(tickets, tickets[1:], strict=False)
        if not masks.is_subset(b.mask, a.mask)
    ]


def report_verified(
    paths: Sequence[Path], tickets: Sequence[Ticket], say: Callable[[str], Any]
) -> None:
    """Says of each ticket that it is whole, and of each replicate whether its levels are nested.

    Args:
      paths, tickets: files, and what was read of them.
      say: told each.

    Raises:
      InvariantError: weights exceed a mask.
    """
    for path, ticket in zip(paths, tickets, strict=True):
        ticket.verify()
        say(f"{path}: whole, {ticket.density:.4%}")
    chains: dict[tuple, list[Ticket]] = {}
    for ticket in tickets:
        if ticket.origin.get("arm") == "ticket":
            about = ticket.spec.digest(), ticket.origin.get("replicate")
            chains.setdefault(about, []).append(ticket)
    for (_, replicate), chain in chains.items():
        chain.sort(key=lambda ticket: ticket.level)
        if len(chain) > 1:
            apart = [f"{a} and {b}" for a, b in nested(chain)]
            said = f"not nested: {', '.join(apart)}" if apart else "each within the one before"
            say(f"replicate {replicate}, levels {chain[0].level} to {chain[-1].level}: {said}")


def write(how: str, tickets: Sequence[Ticket], output: str | None) -> None:
    """Writes a combined ticket.

    Args:
      how, tickets: see `combined`.
      output: the file.

    Raises:
      UserError: no file is named, or it is there; or see `combined`.
    """
    if not output:
        raise UserError(f"{how} needs --output, the file that it writes")
    path = edge.path(output, "ticket")
    if path.exists():
        raise UserError(f"{output!r} is there already; give another --output, or delete it")
    combined(how, tickets).save(path)
