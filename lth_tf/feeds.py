"""Batches as a function of (seed, step): nothing is shuffled in place, nothing is replayed.

The training images lie in device memory as uint8; a step gathers its batch by index,
scales it in the graph and sees the same examples on any number of replicas.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError

_ORDER, _SPLIT = 1, 2  # streams of random numbers drawn from one seed


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """Returns the permutation of n examples that epoch `epoch` goes through, int32[n]."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(n).astype(np.int32)


def batch_indices(seed: int, first: int, count: int, n: int, batch: int) -> np.ndarray:
    """Returns which examples the steps first .. first + count - 1 see, int32[count, batch].

    An epoch has floor(n / batch) steps; its last n mod batch examples are left out,
    others in each epoch.

    >>> a = batch_indices(0, 0, 5, n=10, batch=4)
    >>> b = batch_indices(0, 3, 2, n=10, batch=4)
    >>> bool((a[3:] == b).all()), len(set(a[:2].ravel()))
    (True, 8)
    """
    per_epoch = n // batch
    rows = []
    for step in range(first, first + count):
        epoch, place = divmod(step, per_epoch)
        rows.append(epoch_order(seed, epoch, n)[place * batch : (place + 1) * batch])
    return np.stack(rows)


def split(dataset: Dataset, validation_size: int, seed: int) -> dict[str, tuple]:
    """Returns 'train', 'validation' and 'test' as (uint8 images, int32 labels).

    The validation examples are drawn from the training set by `seed`.

    Raises:
      UserError: fewer than half of the training examples would remain.
    """
    n = len(dataset.train_labels)
    if validation_size > n // 2:
        raise UserError(
            f"validation_size {validation_size} is more than half of the {n} training examples of "
            f"{dataset.name!r}; give at most {n // 2}"
        )
    order = np.random.default_rng([seed, _SPLIT]).permutation(n)
    held, rest = np.sort(order[:validation_size]), np.sort(order[validation_size:])
    return {
        "train": (dataset.train_images[rest], dataset.train_labels[rest]),
        "validation": (dataset.train_images[held], dataset.train_labels[held]),
        "test": (np.asarray(dataset.test_images), np.asarray(dataset.test_labels)),
    }


def scale(
    images: Any, kind: str, mean: tuple[float, ...], std: tuple[float, ...], dtype: Any
) -> Any:
    """Returns uint8 images [n, h, w, c] as network input, of `dtype`.

    standard: (x / 255 - mean) / std per channel; unit: x / 255; l2: x / 255, then each
    image divided by its L2 norm (as Frankle's public MNIST code does).
    """
    x = tf.cast(images, dtype) / tf.constant(255, dtype)
    if kind == "standard":
        return (x - tf.constant(mean, dtype)) / tf.constant(std, dtype)
    if kind == "l2":
        norm = tf.sqrt(tf.reduce_sum(tf.square(x), axis=[1, 2, 3], keepdims=True))
        return x / tf.maximum(norm, tf.constant(1e-12, dtype))
    return x


def place(arrays: tuple, strategy: Any) -> tuple:
    """Copies (images, labels) to the memory of each of the strategy's devices, once."""
    # The default strategy does not tell its device.
    several = strategy.num_replicas_in_sync > 1
    devices = strategy.extended.worker_devices if several else [None]

    def copied(array: np.ndarray) -> Any:
        def copy(context: Any) -> Any:
            with tf.device(devices[context.replica_id_in_sync_group]):
                return tf.constant(array)

        return strategy.experimental_distribute_values_from_function(copy)

    return tuple(copied(array) for array in arrays)
