"""Replicas and workers: tf.distribute strategies, clusters, and workers on one machine."""

from lth_tf.distribute.strategies import (
    Workers,
    first_replica,
    is_own,
    join,
    lost,
    place_of,
    resolve,
    scored_on,
    scoring,
    strategy_of,
    workers_of,
)

__all__ = [
    "Workers", "first_replica", "is_own", "join", "lost", "place_of", "resolve", "scored_on",
    "scoring", "strategy_of", "workers_of",
]  # fmt: skip
