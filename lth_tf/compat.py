"""The only file that imports tf_keras and tfmot, in the order in which they work.

tfmot must come before anything touches `tf.keras`; otherwise `tf.keras` resolves to
Keras 3 and tfmot refuses every model with a misleading message.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import tensorflow_model_optimization as tfmot  # noqa: E402, I001
import tensorflow as tf  # noqa: E402
import tf_keras as keras  # noqa: E402
from tensorflow_model_optimization.python.core.sparsity.keras import (  # noqa: E402
    pruning_wrapper,
)

PruneLowMagnitude = pruning_wrapper.PruneLowMagnitude

__all__ = ["PruneLowMagnitude", "is_keras_3", "keras", "tf", "tfmot"]


def is_keras_3(thing: object) -> bool:
    """Says whether an object's class comes from Keras 3, which this package cannot prune."""
    return any(c.__module__.split(".")[0] == "keras" for c in type(thing).__mro__)
