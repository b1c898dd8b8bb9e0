"""What the processes of a run tell each other.

Every worker runs the same program. What it must not do for itself, because all have to know
the same or because files are the chief's, goes through `Workers`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from lth_tf.compat import tf
from lth_tf.distribute.strategies import first_replica, index_and_count, lost
from lth_tf.errors import UserError

Arrays = Mapping[str, np.ndarray]
_WORDS = np.dtype("<u4")  # float64 holds each of them exactly
_BLOCKS = 1024, 2**18  # numbers that workers add up in one call


class Workers:
    """The processes of a strategy, most often one; its methods are called by all of them.

    Args:
      strategy: theirs.

    Attributes:
      index, count: which of them this is, the chief is 0, and how many there are.
      chief: whether this is the one that reads and writes files.
    """

    def __init__(self, strategy: Any):
        self._strategy = strategy
        self.index, self.count = index_and_count(strategy)
        self.chief = self.index == 0
        self._add = tf.function(
            lambda values: strategy.run(_added, (values,)), autograph=False
        )

    def share(self, make: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
        """Returns, everywhere, what `make` returns at the chief: arrays and JSON-ready values.

        Raises:
          UserError: `make` raised one; it is raised everywhere.
        """
        if self.count == 1:
            return make()
        arrays, (problem, value) = self.tell(self._outcome(make) if self.chief else ({}, None), 0)
        if problem is not None:
            raise UserError(problem)
        return arrays, value

    @staticmethod
    def _outcome(make: Callable[[], tuple[Arrays, Any]]) -> tuple[Arrays, Any]:
        try:
            arrays, value = make()
        except UserError as error:
            return {}, [str(error), None]
        return arrays, [None, value]

    def tell(self, own: tuple[Arrays, Any], source: int) -> tuple[Arrays, Any]:
        """Returns what worker `source` gave: arrays and JSON-ready values."""
        if self.count == 1:
            return own
        mine = self.index == source
        content = _packed(*own) if mine else b""
        size = int(self._total(np.array([len(content)], np.float64), mine)[0])
        words = np.zeros(-(-size // 4), _WORDS)
        if mine:
            words.view(np.uint8)[:size] = np.frombuffer(content, np.uint8)
        return _unpacked(self._total(words, mine).tobytes()[:size])

    def each(self, own: tuple[Arrays, Any]) -> list[tuple[Arrays, Any]]:
        """Returns what every worker gave, in the order of the workers."""
        return [self.tell(own, source) for source in range(self.count)]

    def agree(self, do: Callable[[], Any]) -> Any:
        """Returns what `do` returns here, where it succeeds on every worker.

        Raises:
          UserError: it raised one on some worker; it is raised everywhere.
        """
        if self.count == 1:
            return do()
        result, problem = None, None
        try:
            result = do()
        except UserError as error:
            problem = str(error)
        problems = [value for _, value in self.each(({}, problem))]
        for worker, found in enumerate(problems):
            if found:
                raise UserError(found if worker == self.index else f"worker {worker}: {found}")
        return result

    def add(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Returns the sums over the workers of what each gives: float arrays of equal shapes."""
        if self.count == 1:
            return values
        flat = np.concatenate([np.ravel(value) for value in values]).astype(np.float64)
        ends = np.cumsum([value.size for value in values])[:-1]
        parts = np.split(self._total(flat, True), ends)
        return [
            part.reshape(value.shape).astype(value.dtype)
            for part, value in zip(parts, values, strict=True)
        ]

    def _total(self, values: np.ndarray, mine: bool) -> np.ndarray:
        """The sum over the workers of values [n], in float64; 0 counts for what is not `mine`."""
        # In blocks of two sizes, since there is a graph for each.
        size = _BLOCKS[len(values) > _BLOCKS[0]]
        total = np.empty_like(values)
        for start in range(0, len(values), size):
            part = values[start : start + size]
            block = np.zeros(size)
            if mine:
                block[: len(part)] = part
            total[start : start + size] = self._add_block(block)[: len(part)]
        return total

    def _add_block(self, block: np.ndarray) -> np.ndarray:
        first, zeros = first_replica(self._strategy), np.zeros_like(block)
        given = self._strategy.experimental_distribute_values_from_function(
            lambda c: tf.constant(block if c.replica_id_in_sync_group == first else zeros)
        )
        with lost():
            found = self._strategy.experimental_local_results(self._add(given))
        return found[0].numpy()


@functools.lru_cache(maxsize=1)
def workers_of(strategy: Any) -> Workers:
    """Returns the strategy's workers, the same at every call."""
    return Workers(strategy)


def _packed(arrays: Arrays, value: Any) -> bytes:
    text = json.dumps(value).encode()
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    return len(text).to_bytes(8, "little") + text + safetensors.numpy.save(contiguous)


def _unpacked(content: bytes) -> tuple[dict[str, np.ndarray], Any]:
    end = 8 + int.from_bytes(content[:8], "little")
    return safetensors.numpy.load(content[end:]), json.loads(content[8:end])


def _added(values: Any) -> Any:
    # A copy, which has a device; an argument has none.
    here = tf.identity(values)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, here)
