"""What augmentation draws: a function of (seed, step, position in the global batch) alone.

Neither the device, XLA, the number of replicas nor what was drawn before has a say, so
any step is reached without replay. Memory and streams draw the same numbers.
"""

from __future__ import annotations

from typing import Any

from lth_tf.compat import tf

TRIES = 10  # boxes drawn in the hope that one fits
BOX = 2 * TRIES + 2  # numbers that a box takes
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: Any, step: Any, positions: Any, count: int) -> Any:
    """Returns numbers from 0 to 1 (excluded), multiples of 2^-24, as float32 [n, count].

    SplitMix64 (Steele, Lea and Flood 2014), started at a hash of seed and step. TensorFlow's
    own stateless numbers are others under XLA than without.

    Args:
      seed, step: integers or tensors [].
      positions: of the examples in the global batch, integers [n].
      count: how many numbers for each of them.
    """
    golden = tf.constant(_GOLDEN, tf.uint64)
    seed, step, positions = (_uint64(value) for value in (seed, step, positions))
    key = _mix(_mix(seed + golden) + step)
    at = positions[:, None] * tf.constant(count, tf.uint64) + _uint64(tf.range(1, count + 1))
    top = tf.bitwise.right_shift(_mix(key + at * golden), tf.constant(40, tf.uint64))
    return tf.cast(tf.cast(top, tf.int32), tf.float32) * 2.0**-24


def _uint64(value: Any) -> Any:
    return tf.cast(tf.convert_to_tensor(value), tf.uint64)


def _mix(z: Any) -> Any:
    """A bijection of 64 bits in which each bit of the input moves half of the output's."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, tf.constant(shift, tf.uint64)))
        z *= tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(z, tf.bitwise.right_shift(z, tf.constant(31, tf.uint64)))


def boxes(numbers: Any, height: Any, width: Any) -> tuple[Any, Any, Any, Any]:
    """Returns top, left, height and width in pixels, each float32 [n], of random parts.

    The area is 8 % to 100 % of the image's, the ratio of width to height 3/4 to 4/3 with
    an even logarithm (Szegedy et al. 2015, section 6, as Inception and torchvision do it):
    the first of TRIES drawn pairs that fits, else the largest square in the middle.

    Args:
      numbers: float32 [n, BOX], from 0 to 1.
      height, width: of the image, both integers or float32 [].
    """
    height, width = tf.cast(height, tf.float32), tf.cast(width, tf.float32)
    area = (0.08 + 0.92 * numbers[:, :TRIES]) * height * width
    ratio = tf.exp((2 * numbers[:, TRIES : 2 * TRIES] - 1) * tf.math.log(4 / 3))
    tall, wide = tf.sqrt(area / ratio), tf.sqrt(area * ratio)
    fits = (tall <= height) & (wide <= width)
    first, found = tf.argmax(fits, -1, tf.int32), tf.reduce_any(fits, -1)
    square = tf.minimum(height, width)
    tall = tf.where(found, tf.gather(tall, first, batch_dims=1), square)
    wide = tf.where(found, tf.gather(wide, first, batch_dims=1), square)
    down = tf.where(found, numbers[:, 2 * TRIES], 0.5)
    right = tf.where(found, numbers[:, 2 * TRIES + 1], 0.5)
    return down * (height - tall), right * (width - wide), tall, wide
