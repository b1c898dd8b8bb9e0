"""Batches as a function of (seed, step): nothing is shuffled in place, nothing is replayed.

Where the training inputs lie in device memory, a step gathers its batch by index;
others are streamed, see `datasets.stream`. It is scaled in the graph, and any number of
replicas see the same examples.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.datasets import Dataset, Streamed, stream
from lth_tf.datasets.augmentation import augment
from lth_tf.datasets.scaling import scaled
from lth_tf.datasets.stream import Shard
from lth_tf.distribute import first_replica, index_and_count
from lth_tf.errors import UserError, brief
from lth_tf.spec import Spec

CHUNK = 1000  # most steps in one call of the graph
EVALUATION_BATCH = 1000  # most examples in one evaluation step, over all replicas

_ORDER, _SPLIT = 1, 2  # streams of random numbers drawn from one seed


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the permutation of the examples that an epoch goes through, int32[n].

    Args:
      seed: of the order of examples.
      epoch: its number.
      n: how many examples there are.
    """
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(n).astype(np.int32)


def batch_indices(seed: int, first: int, count: int, n: int, batch: int) -> np.ndarray:
    """Returns which examples the steps first .. first + count - 1 see, int32[count, batch].

    An epoch has floor(n / batch) steps; its last n mod batch examples are left out,
    others in each epoch.

    Args:
      seed: of the order of examples.
      first, count: the first step, and how many.
      n: how many examples there are.
      batch: how many a step sees.

    >>> a = batch_indices(0, 0, 5, n=10, batch=4)
    >>> b = batch_indices(0, 3, 2, n=10, batch=4)
    >>> bool((a[3:] == b).all()), len(set(a[:2].ravel()))
    (True, 8)
    """
    per_epoch = n // batch
    rows = []
    for step in range(first, first + count):
        epoch, turn = divmod(step, per_epoch)
        rows.append(epoch_order(seed, epoch, n)[turn * batch : (turn + 1) * batch])
    return np.stack(rows)


def split(dataset: Dataset, validation_size: int, seed: int) -> dict[str, tuple]:
    """Returns 'train', 'validation' and 'test' as (inputs, labels).

    Args:
      dataset: in memory.
      validation_size: how many examples of the training set are held out.
      seed: by which they are drawn.

    Raises:
      UserError: fewer than half of the training examples would remain.
    """
    n = len(dataset.train_labels)
    _require_half(dataset, n, validation_size)
    order = np.random.default_rng([seed, _SPLIT]).permutation(n)
    held, rest = np.sort(order[:validation_size]), np.sort(order[validation_size:])
    return {
        "train": (dataset.train_inputs[rest], dataset.train_labels[rest]),
        "validation": (dataset.train_inputs[held], dataset.train_labels[held]),
        "test": (np.asarray(dataset.test_inputs), np.asarray(dataset.test_labels)),
    }


def _require_half(dataset: Dataset | Streamed, n: int, validation_size: int) -> None:
    if validation_size > n // 2:
        raise UserError(
            f"validation_size {validation_size} is more than half of the {n} training examples of "
            f"{dataset.name!r}; give at most {n // 2}"
        )


def shards(dataset: Streamed, validation_size: int) -> dict[str, Sequence[Shard]]:
    """Returns 'train', 'validation' and 'test': where their records are.

    The validation examples are the last of the training set, whatever the seed: its shards
    were shuffled when they were written.

    Raises:
      UserError: fewer than half of the training examples would remain.
    """
    _require_half(dataset, stream.size(dataset.train), validation_size)
    train, held = stream.cut(dataset.train, validation_size)
    return {"train": train, "validation": held, "test": dataset.test}


def walk(
    dataset: Streamed, validation_size: int, batch: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the training part once, in an order drawn by `seed`, without augmentation.

    Args:
      dataset: on disk.
      validation_size: how many examples of the training set are held out.
      batch: how many are yielded at a time.
      seed: of the order.

    Yields:
      uint8 inputs [b, h, w, c] and int32 labels [b]; b is `batch`, in the end what is left.

    Raises:
      UserError: a record cannot be read or decoded.
    """
    train = shards(dataset, validation_size)["train"]
    with _reading(dataset):
        yield from stream.walk(dataset, train, batch, seed)


@contextlib.contextmanager
def _reading(dataset: Streamed) -> Iterator[None]:
    """Within, what TensorFlow says of a record that cannot be read is a UserError."""
    kinds = ("DataLoss", "FailedPrecondition", "InvalidArgument", "NotFound", "OutOfRange")
    try:
        yield
    except tuple(getattr(tf.errors, f"{kind}Error") for kind in kinds) as error:
        folder = os.path.dirname(dataset.train[0].path)
        raise UserError(
            f"the records of {dataset.name!r} in {folder} cannot be read or decoded "
            f"({brief(error)}); prepare or copy that folder again"
        ) from error


class Resident:
    """A feed of a data set that lies in the memory of each device.

    Every feed has these methods. `begin` and `part` are for the host: what they return is
    given to a graph, which has `take` or `block` pick one step's data out of it, and
    `batch` or `examples` make network input of those on each replica.

    Args:
      dataset: inputs and labels.
      spec: batch size, validation size, scaling, augmentation, precision.
      strategy: whose replicas share a batch.

    Attributes:
      sizes: 'train', 'validation' and 'test' -> number of examples.
      loops: whether XLA can compile a loop over steps.
      most: steps that `begin` has room for.

    Raises:
      UserError: too few training examples.
    """

    loops = True

    def __init__(self, dataset: Dataset, spec: Spec, strategy: Any):
        self.dataset, self.spec, self.strategy = dataset, spec, strategy
        parts = split(dataset, spec.validation_size, spec.seed)
        self.sizes = {name: len(labels) for name, (_, labels) in parts.items()}
        self._parts = {name: on_devices(arrays, strategy) for name, arrays in parts.items()}
        self.most = max(CHUNK // spec.eval_every * spec.eval_every, min(CHUNK, spec.eval_every))

    def begin(self, step: int, end: int, seed: int) -> tuple:
        """Returns what the graph needs for the steps step .. end - 1.

        Args:
          step, end: the first step, and the one after the last.
          seed: of the order of examples.
        """
        # One shape for all blocks, or XLA compiles again.
        indices = np.zeros((self.most, self.spec.batch_size), np.int32)
        if end > step:
            indices[: end - step] = batch_indices(
                seed, step, end - step, self.sizes["train"], self.spec.batch_size
            )
        return (*self._parts["train"], tf.constant(indices))

    def held_out(self, step: int, end: int, seed: int) -> tuple:
        """Returns what `begin` does, for one batch of the validation part.

        Args:
          step, seed: decide which examples.
          end: not looked at.

        Raises:
          UserError: it has fewer than a batch.
        """
        most = self.sizes["validation"]
        if most < self.spec.batch_size:
            raise UserError(
                f"grow_batch held_out needs {self.spec.batch_size} validation examples, and there "
                f"are {most}; give more (validation_size), or --grow_batch=train"
            )
        rng = np.random.default_rng([seed % 2**64, step, 0x6807])
        indices = np.zeros((self.most, self.spec.batch_size), np.int32)
        indices[0] = rng.choice(most, self.spec.batch_size, replace=False)
        return (*self._parts["validation"], tf.constant(indices))

    def take(self, source: tuple, i: Any) -> tuple:
        """Returns the data of the i-th step, out of what `begin` returned."""
        inputs, labels, indices = source
        return inputs, labels, indices[i]

    def batch(self, taken: tuple, seed: Any, step: Any) -> tuple[Any, Any]:
        """Returns a replica's share of a training batch: scaled, augmented inputs; labels.

        Args:
          taken: what `take` returned.
          seed, step: of what augmentation draws.
        """
        inputs, labels, chosen = taken
        first, share = _share(self.strategy, self.spec.batch_size)
        chosen = chosen[first : first + share]
        x = scaled(tf.gather(inputs, chosen), self.dataset, self.spec)
        x = augment(x, self.spec.augmentation, seed, step, first)
        return x, tf.gather(labels, chosen)

    def part(self, name: str) -> tuple:
        """Returns what the graph needs to evaluate on a part."""
        return self._parts[name]

    def blocks(self, name: str) -> int:
        """Returns in how many blocks a part is evaluated."""
        return math.ceil(self.sizes[name] / EVALUATION_BATCH)

    def block(self, source: tuple, i: Any) -> tuple:
        """Returns the data of the i-th block, out of what `part` returned."""
        return (*source, i)

    def examples(self, taken: tuple, name: str) -> tuple[Any, Any, Any]:
        """Returns a replica's share of a block: scaled inputs, labels, which of them count."""
        inputs, labels, i = taken
        n = self.sizes[name]
        share = math.ceil(n / self.blocks(name) / self.strategy.num_replicas_in_sync)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        chosen = (i * self.strategy.num_replicas_in_sync + replica) * share + tf.range(share)
        within = tf.minimum(chosen, n - 1)
        x = scaled(tf.gather(inputs, within), self.dataset, self.spec)
        return x, tf.gather(labels, within), chosen < n

    def reading(self) -> contextlib.AbstractContextManager:
        """Around a graph's call: a record that cannot be read is a UserError."""
        return contextlib.nullcontext()


class Streaming:
    """A feed of a data set on disk, decoded on the host while the device computes.

    What its graph is given is an iterator, so XLA can compile a step but no loop over steps.
    A worker reads and decodes its own share of each batch, for the replicas that it has.
    Attributes and methods are those of `Resident`.

    Args:
      dataset: on disk.
      spec, strategy: see `Resident`.
    """

    loops = False
    most = CHUNK

    def __init__(self, dataset: Streamed, spec: Spec, strategy: Any):
        self.dataset, self.spec, self.strategy = dataset, spec, strategy
        self._shards = shards(dataset, spec.validation_size)
        self.sizes = {name: stream.size(found) for name, found in self._shards.items()}
        self._worker = index_and_count(strategy)
        self._evaluations = {
            name: stream.evaluation(dataset, found, spec.batch_size, self._worker)
            for name, found in self._shards.items()
        }
        self._resized = spec.augmentation == "resized_crop"
        self._iterator: Any = None
        self._at: tuple[int, int] | None = None  # the seed and step that the iterator is at

    def held_out(self, step: int, end: int, seed: int) -> tuple:
        """Raises UserError: no single batch is read of a data set on disk.

        Args:
          step, end, seed: not looked at.
        """
        raise UserError(
            f"grow_batch held_out needs a data set in memory, and {self.dataset.name!r} is read "
            "from disk; use --grow_batch=train"
        )

    def begin(self, step: int, end: int, seed: int) -> tuple:
        """Returns an iterator whose next batches are those of step .. end - 1.

        Args:
          step, end, seed: see `Resident.begin`.
        """
        stream.release()  # 10 to 20 ms, now and then
        if self._at != (seed, step):
            self._iterator = None  # its buffers go before there are new ones
            train, batch = self._shards["train"], self.spec.batch_size
            found = stream.training(
                self.dataset, train, batch, seed, step, self._resized, self._worker
            )
            self._iterator = iter(found)
        self._at = seed, end
        return (self._iterator,)

    def take(self, source: tuple, i: Any) -> tuple:
        """Returns the next batch."""
        return source[0].get_next()

    def batch(self, taken: tuple, seed: Any, step: Any) -> tuple[Any, Any]:
        """Returns a replica's share of a training batch: scaled, augmented inputs; labels.

        Args:
          taken: what `take` returned.
          seed, step: of what augmentation draws.
        """
        inputs, labels, first = self._part(taken)
        x = scaled(inputs, self.dataset, self.spec)
        kind = "none" if self._resized else self.spec.augmentation
        return augment(x, kind, seed, step, first), labels

    def part(self, name: str) -> tuple:
        """Returns an iterator over the blocks of a part."""
        return (iter(self._evaluations[name]),)

    def blocks(self, name: str) -> int:
        """Returns in how many blocks a part is evaluated; of batch_size, which fits memory."""
        return math.ceil(self.sizes[name] / self.spec.batch_size)

    block = take

    def examples(self, taken: tuple, name: str) -> tuple[Any, Any, Any]:
        """Returns a replica's share of a block: scaled inputs, labels, which of them count."""
        inputs, labels, _ = self._part(taken)
        x = scaled(inputs, self.dataset, self.spec)
        return x, tf.maximum(labels, 0), labels >= 0

    def _part(self, taken: tuple) -> tuple[Any, Any, Any]:
        first, share = _share(self.strategy, self.spec.batch_size)
        worker, workers = self._worker
        here = first - worker * (self.spec.batch_size // workers)  # in what this worker has
        with tf.device("cpu:0"):  # other replicas' examples need not travel to this one's device
            inputs, labels = (array[here : here + share] for array in taken)
        return inputs, labels, first

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around a graph's call: a record that cannot be read is a UserError."""
        try:
            with _reading(self.dataset):
                yield
        except BaseException:
            self._at = None  # who knows how far it came
            raise


def feed(dataset: Dataset | Streamed, spec: Spec, strategy: Any) -> Resident | Streaming:
    """Returns the feed for that kind of data set.

    Args:
      dataset: in memory or on disk.
      spec, strategy: see `Resident`.
    """
    if isinstance(dataset, Streamed):
        return Streaming(dataset, spec, strategy)
    return Resident(dataset, spec, strategy)


def _share(strategy: Any, size: int) -> tuple[int, int]:
    """Returns the first example of a batch that is this replica's, and how many are."""
    share = size // strategy.num_replicas_in_sync
    return tf.distribute.get_replica_context().replica_id_in_sync_group * share, share


def on_devices(arrays: tuple, strategy: Any) -> tuple:
    """Copies arrays to the memory of each of the strategy's devices here, once."""
    # The default strategy does not tell its device.
    several = strategy.num_replicas_in_sync > 1
    devices = strategy.extended.worker_devices if several else [None]
    first = first_replica(strategy)

    def copied(array: np.ndarray) -> Any:
        def copy(context: Any) -> Any:
            with tf.device(devices[context.replica_id_in_sync_group - first]):
                return tf.constant(array)

        return strategy.experimental_distribute_values_from_function(copy)

    return tuple(copied(array) for array in arrays)
