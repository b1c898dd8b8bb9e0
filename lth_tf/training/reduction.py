"""Adding up gradients over replicas: all entries, or only those that the mask keeps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lth_tf import distribute, masks, pruning
from lth_tf.compat import tf
from lth_tf.masks import Mask
from lth_tf.training import feeds

WORTH = 0.5  # density below which `auto` packs what goes over a network


class Reduction:
    """Sums of gradients over the replicas of a strategy.

    Every replica has the same mask, and the gradient of a pruned weight is zero. So the
    entries that are kept, those of all other trainable variables and the loss can be
    packed into one buffer, added up in one collective operation, and unpacked: what is sent
    falls with the density.

    Args:
      model: a pruned model.
      strategy: its replicas'.
      communication: 'plain', 'packed', or 'auto': packed between machines, below a density
        of WORTH. Within a machine to pack takes longer than to copy.
    """

    def __init__(self, model: Any, strategy: Any, communication: str):
        self._strategy, self._communication = strategy, communication
        kernels = {id(variable): name for name, variable in pruning.kernels(model).items()}
        trained = model.trainable_variables
        self._names = [kernels.get(id(variable)) for variable in trained]
        self._sizes = [math.prod(variable.shape) for variable in trained]
        self._width = max([variable.dtype.size for variable in trained], default=4)

    def entries(self, mask: Mask) -> Any:
        """Returns the indices of what is packed, int32 [k] on each replica; None: add up all."""
        if not self._packs(mask):
            return None
        return feeds.on_devices((self._indices(mask),), self._strategy)[0]

    def bytes(self, mask: Mask) -> int:
        """Returns the bytes that a replica gives to be added up in each step."""
        if self._strategy.num_replicas_in_sync == 1:
            return 0
        entries = len(self._indices(mask)) if self._packs(mask) else sum(self._sizes) + 1
        return entries * self._width

    def _indices(self, mask: Mask) -> np.ndarray:
        """Which of all entries are packed, the last one is the loss: int32 [k], ascending."""
        chosen = [
            np.ones(size, bool) if name is None else mask[name].reshape(-1) != 0
            for name, size in zip(self._names, self._sizes, strict=True)
        ]
        return np.flatnonzero(np.concatenate([*chosen, [True]])).astype(np.int32)

    def _packs(self, mask: Mask) -> bool:
        density = masks.density(mask)
        if self._strategy.num_replicas_in_sync == 1 or density == 1:
            return False
        if self._communication == "auto":
            return distribute.index_and_count(self._strategy)[1] > 1 and density < WORTH
        return self._communication == "packed"

    def __call__(self, entries: Any, values: list[Any]) -> list[Any]:
        """Returns the sums, in a replica's graph.

        Args:
          entries: what the method `entries` returned for the mask in force.
          values: the gradients of the trainable variables, and the loss.
        """
        if self._strategy.num_replicas_in_sync == 1:
            return values
        add = tf.distribute.get_replica_context().all_reduce
        if entries is None:
            return list(add(tf.distribute.ReduceOp.SUM, values))
        flat = tf.concat([tf.reshape(value, [-1]) for value in values], 0)
        packed = add(tf.distribute.ReduceOp.SUM, tf.gather(flat, entries))
        flat = tf.tensor_scatter_nd_update(flat, entries[:, None], packed)  # the others are zero
        parts = tf.split(flat, [*self._sizes, 1])
        return [tf.reshape(p, v.shape) for p, v in zip(parts, values, strict=True)]
