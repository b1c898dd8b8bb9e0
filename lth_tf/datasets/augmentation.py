"""Random changes to training images: functions of (seed, step, position in the global batch)."""

from __future__ import annotations

import functools
from typing import Any

from lth_tf.compat import tf
from lth_tf.datasets import crops

SHIFT = 4  # most pixels that flip_crop moves an image by


def augment(images: Any, kind: str, seed: Any, step: Any, first: Any = 0) -> Any:
    """Returns a changed copy of a batch, or of a replica's share of it, for training on.

    A function of (seed, step, position in the global batch): see `crops`.

    flip_crop: SHIFT pixels of zeros are put around each image, a random part of the
    original size is cut out of that, and mirrored with probability 1/2 (He et al. 2016,
    section 4.2). In images scaled by `standard` 0 is the mean colour, in others black.

    resized_crop: a random part, see `crops.boxes`, is scaled to full size (bilinear), and
    mirrored with probability 1/2 (Szegedy et al. 2015, section 6).

    Args:
      images: float [n, h, w, c], after `scale`.
      kind: none, flip_crop or resized_crop.
      seed, step: integers or tensors [].
      first: the position of images[0] in the global batch.
    """
    if kind == "none":
        return images
    positions = first + tf.range(images.shape[0])
    draw = functools.partial(crops.uniform, seed, step, positions)
    return _flip_crop(images, draw(3)) if kind == "flip_crop" else _resized_crop(images, draw)


def _flip_crop(images: Any, numbers: Any) -> Any:
    n, h, w, c = images.shape
    down, right = (tf.cast(numbers[:, i] * (2 * SHIFT + 1), tf.int32) for i in (0, 1))
    rows = down[:, None] + tf.range(h)
    columns = right[:, None] + _mirrored(tf.range(w), numbers[:, 2])
    around = [SHIFT, SHIFT]
    padded = tf.pad(images, [[0, 0], around, around, [0, 0]])
    # One gather of pixels: two, of rows and then of columns, take longer on CPUs.
    rows += tf.range(n)[:, None] * padded.shape[1]
    at = rows[:, :, None] * padded.shape[2] + columns[:, None, :]
    return tf.gather(tf.reshape(padded, [-1, c]), at)


def _resized_crop(images: Any, draw: Any) -> Any:
    n, h, w, c = images.shape
    numbers = draw(crops.BOX + 1)
    top, left, tall, wide = crops.boxes(numbers, h, w)
    rows = _between(tf.range(h)[None], top, tall, h, images.dtype)
    columns = _between(_mirrored(tf.range(w), numbers[:, -1]), left, wide, w, images.dtype)
    # As products with matrices that have two weights a row: quicker than gathering pixels.
    images = tf.reshape(rows @ tf.reshape(images, [n, h, w * c]), [n, h, w, c])
    return columns[:, None] @ images


def _mirrored(positions: Any, numbers: Any) -> Any:
    """[n, w]: the positions 0 .. w - 1, backwards where the number is below 1/2."""
    return tf.where(numbers[:, None] < 0.5, positions[::-1], positions)


def _between(positions: Any, start: Any, length: Any, size: int, dtype: Any) -> Any:
    """[n, size, size]: row i has the weights of the pixels around the centre of pixel i.

    Pixel i of `size` lies, centre over centre, in the part of `length` pixels at `start`;
    beyond the image's border its outermost pixels go on.
    """
    at = start[:, None] + (tf.cast(positions, tf.float32) + 0.5) * (length[:, None] / size) - 0.5
    at = tf.cast(tf.clip_by_value(at, 0, size - 1), dtype)
    return tf.nn.relu(1 - tf.abs(at[:, :, None] - tf.range(size, dtype=dtype)))
