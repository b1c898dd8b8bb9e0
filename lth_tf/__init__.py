"""Find, verify and ship sparse trainable networks ("tickets") with TensorFlow and Keras."""

from __future__ import annotations

import importlib
import os
from typing import Any

# In time for whoever imports TensorFlow after this: tfmot works with tf_keras only.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

_HOMES = {
    "DATASETS": "datasets",
    "Density": "callbacks",
    "MODELS": "models",
    "SCOPES": "scopes",
    "Rewind": "callbacks",
    "SCORERS": "scorers",
    "Spec": "spec",
    "Ticket": "tickets",
    "UserError": "errors",
    "get_mask": "pruning",
    "imp": "experiments",
    "load_ticket": "tickets",
    "one_shot": "experiments",
    "one_shot_mask": "scorers",
    "prune": "pruning",
    "score": "scorers",
    "set_mask": "pruning",
    "strip": "pruning",
}
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: TensorFlow takes seconds to load."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lth_tf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lth_tf.{_HOMES[name]}"), name)
