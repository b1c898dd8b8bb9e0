"""Replicas and workers: tf.distribute strategies, clusters, and workers on one machine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lth_tf.distribute.strategies import (
        first_replica,
        index_and_count,
        is_own,
        join,
        lost,
        resolve,
        scored_on,
        scoring,
        strategy_of,
    )
    from lth_tf.distribute.workers import Workers, workers_of

__all__ = [
    "Workers", "first_replica", "index_and_count", "is_own", "join", "lost", "resolve", "scored_on",
    "scoring", "strategy_of", "workers_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: to launch workers takes no TensorFlow."""
    if name not in __all__:
        raise AttributeError(f"module 'lth_tf.distribute' has no attribute {name!r}")
    home = "workers" if name in ("Workers", "workers_of") else "strategies"
    return getattr(importlib.import_module(f"lth_tf.distribute.{home}"), name)
