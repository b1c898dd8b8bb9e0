"""Data sets too large for memory: JPEGs in TFRecord shards, read and decoded while training.

The order of an epoch is a function of (seed, epoch): the shards are permuted, READERS of
them read in turn, and their records shuffled within a buffer of SHUFFLE. Every epoch
begins anew from that, so that any step is reached by skipping records of its epoch as they
are, undecoded. What a batch looks like is a function of (seed, step) as in memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

READERS = 16  # shards read in turn
SHUFFLE = 8192  # records in the shuffle buffer; of ImageNet 0.9 GB
AHEAD = 2  # batches decoded before they are asked for
MARGIN = 224 / 256  # side of the part evaluated on, over the image's short side
_FOREVER = 2**62


class Shard(NamedTuple):
    """A run of `length` records of a TFRecord file, from record `first` on."""

    path: str
    first: int
    length: int


@dataclasses.dataclass(frozen=True, eq=False)
class Streamed:
    """A labelled image data set on disk.

    Its records are tf.train.Examples with the features `image`, a JPEG of any size, and
    `label`, an integer from 0 to classes - 1.

    Attributes:
      name: its key in DATASETS.
      train, test: where their records are.
      classes: how many there are.
      mean, std: per channel, of the training images as pixels from 0 to 1.
      input_shape: height, width and channels that images get.
    """

    name: str
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]


def size(shards: Sequence[Shard]) -> int:
    """Returns the number of records."""
    return sum(shard.length for shard in shards)


def cut(shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[Shard]]:
    """Returns the shards without their last `count` records, and those.

    >>> cut([Shard("a", 0, 5), Shard("b", 0, 5)], 7)
    ([Shard(path='a', first=0, length=3)], [Shard(path='a', first=3, length=2), \
Shard(path='b', first=0, length=5)])
    """
    kept, held = [], []
    left = size(shards) - count
    for path, first, length in shards:
        here = min(left, length)
        left -= here
        if here:
            kept.append(Shard(path, first, here))
        if here < length:
            held.append(Shard(path, first + here, length - here))
    return kept, held


def training(
    dataset: Streamed, shards: Sequence[Shard], batch: int, seed: int, step: int, resized: bool
) -> Any:
    """Returns the training batches from step `step` on, without end.

    An epoch has floor(n / batch) steps.

    Args:
      dataset: the shape of its images.
      shards: n records.
      batch: examples per step.
      seed, step: which batches.
      resized: whether images are random parts, see `crops.boxes`, half of them mirrored; as
        `feeds.augment` draws them. Else they are the middle; see `decode`.

    Returns:
      A tf.data.Dataset of uint8 [batch, h, w, c], int32 [batch].
    """
    from lth_tf.compat import tf
    from lth_tf.datasets import crops

    def numbers(step: Any) -> Any:
        return crops.uniform(seed % 2**64, step, tf.range(batch), crops.BOX + 1)

    per_epoch = size(shards) // batch
    epoch, place = divmod(step, per_epoch)
    raw = epochs(shards, seed, epoch, _FOREVER, per_epoch * batch).skip(place * batch)
    if resized:
        # For a whole batch at once: the same for each record would add a quarter to the time.
        drawn = tf.data.Dataset.range(step, _FOREVER).map(numbers).unbatch()
        raw = tf.data.Dataset.zip(raw, drawn)
    examples = raw.map(
        lambda *record: decode(dataset.input_shape, *record), tf.data.AUTOTUNE, deterministic=True
    )
    return examples.batch(batch, drop_remainder=True).prefetch(AHEAD)


def evaluation(dataset: Streamed, shards: Sequence[Shard], batch: int) -> Any:
    """Returns the middle of all images, see `decode`, in an order that never changes.

    Returns:
      A tf.data.Dataset of uint8 [batch, h, w, c], int32 [batch], the last one filled up
      with black images of label -1.
    """
    from lth_tf.compat import tf

    blank = tf.zeros(dataset.input_shape, tf.uint8), tf.constant(-1)
    examples = _central(dataset, records(shards))
    padding = tf.data.Dataset.from_tensors(blank).repeat(-size(shards) % batch)
    return examples.concatenate(padding).batch(batch, drop_remainder=True).prefetch(AHEAD)


def walk(
    dataset: Streamed, shards: Sequence[Shard], batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the records in the order of epoch 0, each once, the middle of images.

    Yields:
      uint8 [b, h, w, c], int32 [b]; b is `batch`, in the end what is left.
    """
    examples = _central(dataset, epochs(shards, seed, 0, 1, size(shards)))
    yield from examples.batch(batch).prefetch(AHEAD).as_numpy_iterator()


def _central(dataset: Streamed, raw: Any) -> Any:
    from lth_tf.compat import tf

    return raw.map(
        lambda record: decode(dataset.input_shape, record), tf.data.AUTOTUNE, deterministic=True
    )


def epochs(shards: Sequence[Shard], seed: int, first: int, end: int, count: int) -> Any:
    """Returns the first `count` records of each of the epochs first .. end - 1.

    Returns:
      A tf.data.Dataset of string [], serialised.
    """
    from lth_tf.compat import tf

    def one(epoch: Any) -> Any:
        # Else tf.random.set_seed, called by whomever, would change what `shuffle` does.
        tf.compat.v1.set_random_seed(1)  # of this function, not of the process
        pair = tf.stack([tf.constant(seed % 2**63, tf.int64), epoch])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(shards)), pair)
        own = tf.random.stateless_uniform([], pair, 0, 2**31 - 1, tf.int64)
        buffer = min(SHUFFLE, size(shards))
        found = records(shards, order).shuffle(buffer, own, reshuffle_each_iteration=False)
        return found.take(count)

    return tf.data.Dataset.range(first, end).flat_map(one)


def records(shards: Sequence[Shard], order: Any = None) -> Any:
    """Returns all records, of READERS shards in turn, these in their order or `order`.

    Returns:
      A tf.data.Dataset of string [], serialised.
    """
    from lth_tf.compat import tf

    path, first, length = zip(*shards, strict=True)
    columns = tf.constant(path), tf.constant(first, tf.int64), tf.constant(length, tf.int64)
    if order is not None:
        columns = tuple(tf.gather(column, order) for column in columns)
    found = tf.data.Dataset.from_tensor_slices(columns).interleave(
        lambda path, first, length: tf.data.TFRecordDataset(path).skip(first).take(length),
        cycle_length=min(READERS, len(shards)),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return found.apply(tf.data.experimental.assert_cardinality(size(shards)))


def decode(shape: tuple[int, int, int], record: Any, numbers: Any = None) -> tuple[Any, Any]:
    """Returns a record's image, uint8 of that shape, and its label, int32 [].

    A part of the image is resized (bilinear). Without `numbers` that is the square in
    the middle whose side is MARGIN of the short side: the same, but for half a pixel, as
    resizing the short side to 256/224 of the network's and cutting out the middle. Else it
    is of `crops.boxes`, in whole pixels, and mirrored where the last number is below 1/2.

    Args:
      shape: height, width, channels.
      record: string [].
      numbers: float32 [crops.BOX + 1].
    """
    from lth_tf.compat import tf
    from lth_tf.datasets import crops

    kinds = {"image": tf.string, "label": tf.int64}
    wanted = {name: tf.io.FixedLenFeature([], kind) for name, kind in kinds.items()}
    found = tf.io.parse_single_example(record, wanted)
    full = tf.io.extract_jpeg_shape(found["image"])[:2]
    if numbers is None:
        side = tf.cast(tf.round(tf.cast(tf.reduce_min(full), tf.float32) * MARGIN), tf.int32)
        length = tf.maximum(tf.stack([side, side]), 1)
        start = (full - length) // 2
    else:
        top, left, tall, wide = crops.boxes(numbers[None, :-1], full[0], full[1])
        length = tf.concat([tall, wide], 0)
        length = tf.clip_by_value(tf.cast(tf.round(length), tf.int32), 1, full)
        start = tf.cast(tf.round(tf.concat([top, left], 0)), tf.int32)
        start = tf.minimum(start, full - length)
    image = tf.io.decode_and_crop_jpeg(
        found["image"],
        tf.concat([start, length], 0),
        channels=shape[2],
        dct_method="INTEGER_ACCURATE",
    )
    image = tf.cast(tf.round(tf.image.resize(image, shape[:2])), tf.uint8)
    if numbers is not None:
        # A slice with step -1 would take as long as decoding.
        image = tf.cond(numbers[-1] < 0.5, lambda: tf.reverse(image, [1]), lambda: image)
    return tf.ensure_shape(image, shape), tf.cast(found["label"], tf.int32)
