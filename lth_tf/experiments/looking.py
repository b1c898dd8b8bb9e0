"""A network under weights of any kind, looked at on a data set's examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from lth_tf import models
from lth_tf.analysis.landscape import Looker
from lth_tf.datasets import Streamed, scaling
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.tasks import TASKS
from lth_tf.training import feeds

_BATCH = 500
_DRAWN = 43  # a stream of random numbers drawn from a spec's seed


def lookers(
    spec: Spec, dataset: Any, examples: int, points: int, least: int, anew: bool = False
) -> tuple[Looker, Looker]:
    """Returns what looks at examples of the training part, and at the test part.

    BatchNormalization's statistics are taken anew on these training examples for the first, which
    networks between two others need.

    Args:
      spec: whose network.
      dataset: inputs and labels, in memory.
      examples: of the training part, drawn once.
      points: of lines that are going to be looked at.
      least: how many these must be.
      anew: whether statistics are taken so for the test part, too, and not those of the weights.

    Raises:
      UserError: a data set on disk, or numbers out of range.
    """
    if isinstance(dataset, Streamed):
        raise UserError(
            f"data set {dataset.name!r} is read from disk; networks are looked at on one in memory"
        )
    if points < least or examples < 1:
        raise UserError(
            f"points {points} and examples {examples}; a line has at least {least} points, and at "
            "least one example"
        )
    model = models.plain_model(spec, tuple(dataset.input_shape), dataset.classes, spec.seed)
    parts = feeds.split(dataset, spec.validation_size, spec.seed)
    count = len(parts["train"][1])
    chosen = np.random.default_rng([spec.seed, _DRAWN]).permutation(count)[:examples]

    def batches(inputs: np.ndarray) -> list[Any]:
        pieces = np.array_split(inputs, -(-len(inputs) // _BATCH))
        return [scaling.scaled(x, dataset, spec) for x in pieces]

    (inputs, labels), (others, answers), task = parts["train"], parts["test"], TASKS[dataset.task]
    train = Looker(model, batches(inputs[chosen]), labels[chosen], task, anew=True)
    return train, Looker(model, batches(others), answers, task, anew, train.inputs)
