"""From what a data set holds to what a network takes in."""

from __future__ import annotations

from typing import Any

from lth_tf.compat import tf
from lth_tf.spec import Spec


def scaled(inputs: Any, dataset: Any, spec: Spec) -> Any:
    """Returns inputs of a data set as the input of a spec's network, in the spec's precision.

    uint8 are images, see `scale`. Of floats only `standard` makes something else:
    (x - mean) / std along the last axis. Other integers stay as they are.

    Args:
      inputs: [n, ...].
      dataset: whose mean and std.
      spec: normalization and precision.
    """
    inputs = tf.convert_to_tensor(inputs)
    dtype = tf.float64 if spec.precision == "float64" else tf.float32
    if inputs.dtype == tf.uint8:
        return scale(inputs, spec.normalization, dataset.mean, dataset.std, dtype)
    if not inputs.dtype.is_floating:
        return inputs
    x = tf.cast(inputs, dtype)
    if spec.normalization == "standard":
        x = (x - tf.constant(dataset.mean, dtype)) / tf.constant(dataset.std, dtype)
    return x


def scale(
    images: Any, kind: str, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any
) -> Any:
    """Returns uint8 images [n, h, w, c] as network input, of `dtype`.

    standard: (x / 255 - mean) / std per channel; unit: x / 255; l2: x / 255, then each
    image divided by its L2 norm (as Frankle's public MNIST code does).

    Args:
      images: uint8 [n, h, w, c].
      kind: standard, unit or l2.
      mean, std: per channel, of pixels from 0 to 1.
      dtype: of the result.
    """
    x = tf.cast(images, dtype) / tf.constant(255, dtype)
    if kind == "standard":
        return (x - tf.constant(mean, dtype)) / tf.constant(std, dtype)
    if kind == "l2":
        norm = tf.sqrt(tf.reduce_sum(tf.square(x), axis=[1, 2, 3], keepdims=True))
        return x / tf.maximum(norm, tf.constant(1e-12, dtype))
    return x
