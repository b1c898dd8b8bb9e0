"""Data sets too large for memory: JPEGs in TFRecord shards, read and decoded while training.

The order of an epoch is a function of (seed, epoch) and the same for any number of workers,
though each reads only its part: the permuted shards, laid end to end, are cut into equal
lanes, and lane g fills the g-th part of every batch. See `lanes` and `lane`. Every epoch
begins anew from that, so that any step is reached by skipping records of its epoch as they
are, undecoded. What a batch looks like is a function of (seed, step) as in memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

LANES = 16  # most of them
READERS = 32  # shards read in turn, over all lanes
SHUFFLE = 8192  # records in the shuffle buffers of all lanes; of ImageNet 0.9 GB
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
      task: what a network is trained for, a key of `tasks.TASKS`.
    """

    name: str
    train: tuple[Shard, ...]
    test: tuple[Shard, ...]
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_shape: tuple[int, int, int]
    task: str = "classification"


def size(shards: Sequence[Shard]) -> int:
    """Returns the number of records."""
    return sum(shard.length for shard in shards)


def cut(shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[Shard]]:
    """Returns the shards without their last `count` records, and those.

    >>> cut([Shard("a", 0, 5), Shard("b", 0, 5)], 7)
    ([Shard(path='a', first=0, length=3)], [Shard(path='a', first=3, length=2), \
Shard(path='b', first=0, length=5)])
    """
    rest, held = [], []
    left = size(shards) - count
    for path, first, length in shards:
        here = min(left, length)
        left -= here
        if here:
            rest.append(Shard(path, first, here))
        if here < length:
            held.append(Shard(path, first + here, length - here))
    return rest, held


def lanes(shards: Sequence[Shard], batch: int) -> int:
    """Returns into how many lanes an epoch is cut: a power of two that divides the batch.

    That is as many workers as read nothing in common. At most one for each shard, since a
    shard that is cut in two is opened twice.

    >>> lanes([Shard("a", 0, 5)] * 9, 12), lanes([Shard("a", 0, 5)] * 9, 48)
    (4, 8)
    """
    return max(2**i for i in range(LANES.bit_length()) if 2**i <= len(shards) and not batch % 2**i)


def release() -> None:
    """Gives memory that was freed back to the system, where the C library is glibc.

    It keeps an arena for every few threads and in each of them what they free. Since an epoch's
    records are read by other threads than those that let go of the last one's, a process would
    grow by a part of the shuffle buffers in each epoch. With a single arena it would not, but
    all threads that decode would wait for it.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def training(
    dataset: Streamed,
    shards: Sequence[Shard],
    batch: int,
    seed: int,
    step: int,
    resized: bool,
    worker_of: tuple[int, int] = (0, 1),
) -> Any:
    """Returns a worker's share of the training batches from step `step` on, without end.

    An epoch has floor(n / batch) steps: as many as its lanes have, each of floor(n / G)
    records of which a step takes batch / G. Worker w of W has the positions w * batch / W up to
    (w + 1) * batch / W - 1 of each batch and reads the lanes that these belong to. Where W
    does not divide G, workers have lanes in common: both read it, each decodes its positions.

    Args:
      dataset: the shape of its images.
      shards: n records.
      batch: examples per step, of all workers.
      seed, step: which batches.
      resized: whether images are random parts, see `crops.boxes`, half of them mirrored; as
        `feeds.augment` draws them. Else they are the middle; see `decode`.
      worker_of: the number w of this worker, and how many there are, which divides `batch`.

    Returns:
      A tf.data.Dataset of uint8 [batch / W, h, w, c], int32 [batch / W].
    """
    from lth_tf.compat import tf
    from lth_tf.datasets import crops

    count, (worker, workers) = lanes(shards, batch), worker_of
    each, share = batch // count, batch // workers
    first, end = worker * count // workers, -(-(worker + 1) * count // workers)
    start = worker * share - first * each  # of the share, in what is read for a step

    def numbers(step: Any) -> Any:
        positions = worker * share + tf.range(share)
        return crops.uniform(seed % 2**64, step, positions, crops.BOX + 1)

    def mine(i: Any, _: Any) -> Any:
        at = i % ((end - first) * each)
        return (start <= at) & (at < start + share)

    per_epoch = size(shards) // batch
    epoch, after = divmod(step, per_epoch)
    raw = tf.data.Dataset.range(first, end).interleave(
        lambda g: epochs(shards, seed, epoch, g, count, per_epoch * each).skip(after * each),
        cycle_length=end - first,
        block_length=each,
    )
    if share < (end - first) * each:
        raw = raw.enumerate().filter(mine).map(lambda _, record: record)
    if resized:
        # For a whole batch at once: the same for each record would add a quarter to the time.
        drawn = tf.data.Dataset.range(step, _FOREVER).map(numbers).unbatch()
        raw = tf.data.Dataset.zip(raw, drawn)
    return _decoded(dataset, raw).batch(share, drop_remainder=True).prefetch(AHEAD)


def evaluation(
    dataset: Streamed, shards: Sequence[Shard], batch: int, worker_of: tuple[int, int] = (0, 1)
) -> Any:
    """Returns the middle of a worker's images, see `decode`, in an order that never changes.

    Worker w of W has the w-th part of the n records, and as many blocks as all others,
    ceil(n / batch).

    Args:
      dataset: the shape of its images.
      shards: n records.
      batch: examples per block, of all workers.
      worker_of: (w, W).

    Returns:
      A tf.data.Dataset of uint8 [batch / W, h, w, c], int32 [batch / W], filled up with black
      images of label -1.
    """
    from lth_tf.compat import tf

    n, (worker, workers) = size(shards), worker_of
    before, after = (n * w // workers for w in (worker, worker + 1))
    own = cut(cut(shards, n - after)[0], after - before)[1]
    blank = tf.zeros(dataset.input_shape, tf.uint8), tf.constant(-1)
    share = batch // workers
    padding = -(-n // batch) * share - size(own)
    examples = tf.data.Dataset.from_tensors(blank).repeat(padding)
    if own:
        examples = _decoded(dataset, records(own)).concatenate(examples)
    return examples.batch(share, drop_remainder=True).prefetch(AHEAD)


def walk(
    dataset: Streamed, shards: Sequence[Shard], batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the records in the order of an epoch 0 of one lane, each once, the middle of images.

    Neither `batch` nor the number of workers changes that order.

    Args:
      dataset: the shape of its images.
      shards: the records.
      batch: how many are yielded at a time.
      seed: of the order.

    Yields:
      uint8 [b, h, w, c], int32 [b]; b is `batch`, in the end what is left.
    """
    raw = epochs(shards, seed, 0, 0, 1, size(shards)).take(size(shards))
    yield from _decoded(dataset, raw).batch(batch).prefetch(AHEAD).as_numpy_iterator()


def _decoded(dataset: Streamed, raw: Any) -> Any:
    from lth_tf.compat import tf

    def example(*record: Any) -> tuple[Any, Any]:
        image, label = decode(dataset.input_shape, *record)
        said = f"a label is not from 0 to {dataset.classes - 1}:"
        inside = tf.debugging.Assert((label >= 0) & (label < dataset.classes), [said, label])
        with tf.control_dependencies([inside]):
            return image, tf.identity(label)

    return raw.map(example, tf.data.AUTOTUNE, deterministic=True)


def epochs(
    shards: Sequence[Shard], seed: int, first: int, number: Any, count: int, most: int
) -> Any:
    """Returns the first `most` records of a lane in every epoch from `first` on, without end.

    Args:
      shards: n records.
      seed, first: of which order.
      number, count: which of how many lanes, 0 to count - 1.
      most: records per epoch, at most floor(n / count).

    Returns:
      A tf.data.Dataset of string [], serialised.
    """
    from lth_tf.compat import tf

    def one(epoch: Any) -> Any:
        # Else tf.random.set_seed, called by whomever, would change what `shuffle` does.
        tf.compat.v1.set_random_seed(1)  # of this function, not of the process
        found, length = lane(shards, seed, epoch, number, count), size(shards) // count
        own = tf.random.stateless_uniform([count], _pair(seed, epoch), 0, 2**31 - 1, tf.int64)
        return (
            _read(found, -(-READERS // count), length)
            .shuffle(min(-(-SHUFFLE // count), length), own[number], reshuffle_each_iteration=False)
            .take(most)
        )

    return tf.data.Dataset.range(first, _FOREVER).flat_map(one)


def lane(
    shards: Sequence[Shard], seed: int, epoch: Any, number: Any, count: int
) -> tuple[Any, Any, Any]:
    """Returns what a lane reads in an epoch: floor(n / count) of the records.

    The shards are permuted and laid end to end; the lane is the `number`-th run of that. The
    last n mod count records are in no lane, others in each epoch.

    Args:
      shards: n records.
      seed, epoch: of which order.
      number, count: which of how many lanes, 0 to count - 1.

    Returns:
      The columns of shards and parts of shards: string [m], int64 [m], int64 [m].
    """
    from lth_tf.compat import tf

    order = tf.random.experimental.stateless_shuffle(tf.range(len(shards)), _pair(seed, epoch))
    path, first, length = (tf.gather(column, order) for column in _columns(shards))
    each = size(shards) // count
    before = tf.cumsum(length, exclusive=True)
    skipped = tf.clip_by_value(tf.cast(number, tf.int64) * each - before, 0, length)
    end = tf.clip_by_value(tf.cast(number + 1, tf.int64) * each - before, 0, length)
    columns = path, first + skipped, end - skipped
    path, first, length = (tf.boolean_mask(column, end > skipped) for column in columns)
    return path, first, length


def _pair(seed: int, epoch: Any) -> Any:
    from lth_tf.compat import tf

    return tf.stack([tf.constant(seed % 2**63, tf.int64), tf.cast(epoch, tf.int64)])


def _columns(shards: Sequence[Shard]) -> tuple[Any, Any, Any]:
    from lth_tf.compat import tf

    path, first, length = zip(*shards, strict=True)
    return tf.constant(path), tf.constant(first, tf.int64), tf.constant(length, tf.int64)


def records(shards: Sequence[Shard]) -> Any:
    """Returns all records, of READERS shards in turn.

    Returns:
      A tf.data.Dataset of string [], serialised.
    """
    return _read(_columns(shards), READERS, size(shards))


def _read(columns: tuple[Any, Any, Any], readers: int, count: int) -> Any:
    from lth_tf.compat import tf

    found = tf.data.Dataset.from_tensor_slices(columns).interleave(
        lambda path, first, length: tf.data.TFRecordDataset(path).skip(first).take(length),
        cycle_length=readers,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return found.apply(tf.data.experimental.assert_cardinality(count))


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
