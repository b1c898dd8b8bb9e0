"""TensorFlow's SavedModel: for TensorFlow Serving, and for the converters that read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf.compat import os_errors, tf
from lth_tf.exporters.served import Reread, Served


def saved_model(served: Served, folder: Path) -> Reread:
    """Writes a SavedModel that plain TensorFlow loads, without this package and Keras.

    `tf.saved_model.load(folder)` has `weights`, path -> variable, and the signatures
    serving_default (images: normalised float32 [None, h, w, c]) and serving_uint8
    (images: raw uint8); both return logits, float32 [None, classes]. Variables are
    dense; their zeros are where the mask has them.

    Args:
      served: the network.
      folder: an empty folder.

    Returns:
      What the folder holds, read back.

    Raises:
      OSError: it cannot be written.
    """
    signatures = {"serving_default": served.logits, "serving_uint8": served.logits_uint8}
    with os_errors():
        tf.saved_model.save(served, str(folder), signatures=signatures)
    with tf.device("cpu:0"):
        loaded = tf.saved_model.load(str(folder))
    return Reread(
        {name: variable.numpy() for name, variable in loaded.weights.items()},
        _caller(loaded, "serving_default"),
        _caller(loaded, "serving_uint8"),
    )


def _caller(loaded: Any, signature: str) -> Callable[[np.ndarray], np.ndarray]:
    function = loaded.signatures[signature]
    return lambda images: function(images=tf.constant(images))["logits"].numpy()
