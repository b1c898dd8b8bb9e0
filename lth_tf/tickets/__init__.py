"""Tickets: a mask and the weights to start from, in one file that says where it came from."""

from lth_tf.tickets.files import (
    found_in,
    load_ticket,
    load_trained,
    require_metrics,
    save_trained,
    solution,
    whose,
)
from lth_tf.tickets.ticket import LIBRARIES, Ticket, told, versions

__all__ = [
    "LIBRARIES",
    "Ticket",
    "found_in",
    "load_ticket",
    "load_trained",
    "require_metrics",
    "save_trained",
    "solution",
    "told",
    "versions",
    "whose",
]
