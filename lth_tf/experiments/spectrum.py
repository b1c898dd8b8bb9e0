"""The largest eigenvalues of the loss's Hessian, while a ticket is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse.linalg

from lth_tf import distribute, models, pruning
from lth_tf.analysis import summary
from lth_tf.compat import keras
from lth_tf.datasets import Streamed
from lth_tf.errors import UserError
from lth_tf.experiments.picking import Batches
from lth_tf.masks import Mask
from lth_tf.scorers.network import Network
from lth_tf.tasks import TASKS
from lth_tf.tickets import Ticket
from lth_tf.training import feeds

MANY = 10
EXAMPLES = 1000
HEADER = ("step", "rank", "eigenvalue")
_DRAWN = 41  # a stream of random numbers drawn from a ticket's seed


def largest(
    product: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]], mask: Mask,
    many: int = MANY, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Returns the largest eigenvalues of a symmetric matrix over the kept weights, highest first.

    By Lanczos iterations (ARPACK's, restarted), which take products with the matrix alone; to a
    relative precision of 1e-4.

    Args:
      product: of the matrix with a vector: kernel name -> array, of which entries that the mask
        prunes are zero going in and not looked at coming out.
      mask: kernel name -> 0/1 array.
      many: how many; fewer where fewer weights are kept.
      seed: of the vector begun with.

    Returns:
      float64 [many], NaN for those that did not converge.
    """
    kept = {name: np.flatnonzero(m) for name, m in mask.items()}
    size = sum(map(len, kept.values()))
    ends = np.cumsum([len(at) for at in kept.values()])[:-1]

    def times(vector: np.ndarray) -> np.ndarray:
        given = {}
        for (name, at), values in zip(kept.items(), np.split(np.ravel(vector), ends), strict=True):
            whole = np.zeros(mask[name].size)
            whole[at] = values
            given[name] = whole.reshape(mask[name].shape)
        found = product(given)
        return np.concatenate(
            [np.ravel(found[name])[at].astype(np.float64) for name, at in kept.items()]
        )

    many = min(many, size)
    if size <= 2 * many + 1:  # too small for Lanczos: the whole matrix
        matrix = np.stack([times(row) for row in np.eye(size)])
        return np.linalg.eigvalsh((matrix + matrix.T) / 2)[::-1][:many]
    operator = scipy.sparse.linalg.LinearOperator((size, size), times, dtype=np.float64)
    begin = np.random.default_rng(seed).standard_normal(size)
    try:
        found = scipy.sparse.linalg.eigsh(
            operator, many, which="LA", v0=begin, tol=1e-4, return_eigenvectors=False
        )
    except scipy.sparse.linalg.ArpackNoConvergence as error:
        found = error.eigenvalues
    found = np.sort(found)[::-1]
    return np.pad(found, (0, many - len(found)), constant_values=np.nan)


class Spectrum(keras.callbacks.Callback):
    """Writes the largest eigenvalues of the Hessian of the training loss at chosen steps.

    The loss is the mean over EXAMPLES training examples, the same at all steps, in float64, without
    weight decay and label smoothing; BatchNormalization takes the statistics of these examples, in
    batches of `score_batch_size`. Differentiated is by the kept weights of kernels alone.

    Args:
      path: of hessian.csv; what it says of earlier steps stays.
      ticket: what is trained.
      dataset: inputs and labels.
      blueprint: of the network.
      strategy: over whose devices batches are dealt out.
      steps: at which it looks.

    Raises:
      UserError: a step is never come to, or the model has no second derivative.
    """

    looks = True

    def __init__(
        self, path: Path, ticket: Ticket, dataset: Any, blueprint: models.Blueprint, strategy: Any,
        steps: Iterable[int],
    ):  # fmt: skip
        super().__init__()
        self.path, self.ticket, self.strategy = path, ticket, strategy
        self.steps = sorted(set(steps))
        self._workers = distribute.workers_of(strategy)
        spec, seed = ticket.spec, ticket.origin["seed"]
        if isinstance(dataset, Streamed):
            raise UserError(
                f"hessian_at needs a data set in memory, and {dataset.name!r} is read from disk"
            )
        inputs, labels = feeds.split(dataset, spec.validation_size, spec.seed)["train"]
        rng = np.random.default_rng([seed, _DRAWN])
        chosen = rng.permutation(len(labels))[:EXAMPLES]
        self._batches = Batches(inputs[chosen], labels[chosen], spec, dataset, seed)
        self._loss = TASKS[dataset.task].losses
        shape, classes = blueprint.input_shape, blueprint.classes
        self._plain = models.plain_model(spec, shape, classes, spec.seed)
        self._network = Network(self._plain, dtype="float64", batch_norm="train")

    def next_boundary(self, step: int) -> int | None:
        """Returns the next step to look at."""
        return next((each for each in self.steps if each > step), None)

    def on_train_begin(self, logs: Any = None) -> None:
        """Looks at the weights that training begins with."""
        if self.ticket.rewind_step in self.steps:
            self._look(self.ticket.rewind_step)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Looks, where that is due."""
        if (logs or {}).get("step") in self.steps:
            self._look((logs or {})["step"])

    def _look(self, step: int) -> None:
        _, told = self._workers.share(lambda: ({}, self._told()))
        if any(row["step"] == step for row in told):
            return  # a training that goes on
        weights = {name: v.numpy() for name, v in pruning.weights(self.model).items()}
        pruning.assign(self._plain, weights)
        kernels = {name: weights[name] for name in pruning.kernels(self.model)}

        def product(vector: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            return self._network.hessian_product(kernels, self._batches, self._loss, vector)

        with distribute.scoring(self.strategy):
            values = largest(product, pruning.get_mask(self.model), seed=self.ticket.origin["seed"])
        told += [
            dict(zip(HEADER, (step, rank, float(value)), strict=True))
            for rank, value in enumerate(values, 1)
        ]
        if self._workers.chief:
            summary.write_csv(self.path, HEADER, sorted(told, key=lambda row: row["step"]))

    def _told(self) -> list[dict[str, Any]]:
        return summary.read_csv(self.path) if self.path.exists() else []
