"""What every exporter gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lth_tf import pruning
from lth_tf.compat import tf


class Reread(NamedTuple):
    """A network as an exporter reads it back from its files.

    Attributes:
      weights: path -> array, in the shapes and dtypes of the model.
      logits: normalised images, float32 [n, h, w, c] -> float32 [n, classes].
      logits_uint8: raw images, uint8 [n, h, w, c] -> float32 [n, classes].
    """

    weights: Mapping[str, np.ndarray]
    logits: Callable[[np.ndarray], np.ndarray]
    logits_uint8: Callable[[np.ndarray], np.ndarray]


class Served(tf.Module):
    """A plain model as it is served: variables by name, and two functions of images.

    It knows TensorFlow's variables and functions only, no Keras objects, so that a
    process without Keras can load it.

    Args:
      model: a plain Keras model that ends in logits, float32 or float64.
      scale: (uint8 images, dtype=) -> normalised images; see `scaling.scale`.

    Attributes:
      weights: path -> variable, as `pruning.weights` names them.
      logits: tf.function, images: normalised float32 [None, h, w, c] -> {"logits": float32
        [None, classes]}.
      logits_uint8: the same for raw uint8 images, which it normalises first.
    """

    def __init__(self, model: Any, scale: Callable[..., Any]):
        super().__init__(name="lth_tf")
        self.weights = pruning.weights(model)
        shape, dtype = [None, *model.input_shape[1:]], dtype_of(model)

        def answer(x: Any) -> dict[str, Any]:
            return {"logits": tf.cast(model(x, training=False), tf.float32)}

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.float32, "images")])
        def logits(images: Any) -> dict[str, Any]:
            return answer(tf.cast(images, dtype))

        @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, "images")])
        def logits_uint8(images: Any) -> dict[str, Any]:
            return answer(scale(images, dtype=dtype))

        self.logits, self.logits_uint8 = logits, logits_uint8


def dtype_of(model: Any) -> Any:
    """Returns the dtype in which a plain model computes: that of its kernels."""
    return next(iter(pruning.kernels(model).values())).dtype
