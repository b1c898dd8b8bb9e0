"""Batches that scorers look at: walked, checked against the model, their results added up."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lth_tf.compat import tf
from lth_tf.errors import UserError

Batch = tuple[Any, Any]
Loss = Callable[[Any, Any], Any]


class Parts:
    """(inputs, labels, factor of the sum of the batch's losses) of each batch, at every walk.

    Args:
      batches: (inputs, labels [n]), the same at every walk.
      summed: whether the batches' mean losses are added up, or averaged over all examples.

    Attributes:
      sizes: the number of examples of each batch.

    Raises:
      UserError: there are none, or one is no pair or empty.
    """

    def __init__(self, batches: Iterable[Batch] | None, summed: bool):
        if batches is None:
            raise UserError("this scorer needs batches: an iterable of (inputs, labels)")
        self.batches = batches
        self.sizes = []
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise UserError(
                    f"a batch is (inputs, labels), not {type(batch).__name__}; for a single one "
                    "give [(inputs, labels)]"
                )
            for each in tf.nest.flatten(batch):
                _require_dense(each)
            if not np.ndim(batch[1]):
                raise UserError("labels must have the shape [n]; is the tf.data set not batched?")
            self.sizes.append(len(batch[1]))
        if not all(self.sizes) or not self.sizes:
            raise UserError("a batch is empty: scores need at least one example in each")
        self.summed = summed

    def __iter__(self) -> Iterator[tuple[Any, Any, float]]:
        for (inputs, labels), size in zip(self.batches, self.sizes, strict=True):
            yield inputs, labels, 1 / size if self.summed else 1 / sum(self.sizes)


def _require_dense(each: Any) -> None:
    """Raises UserError for a part of a batch that is no array or dense tensor."""
    kinds = {tf.RaggedTensor: "ragged", tf.SparseTensor: "sparse"}
    for kind, word in kinds.items():
        if isinstance(each, kind):
            raise UserError(
                f"a batch has a {word} tensor, and scores are taken on dense ones: convert it "
                f"({'x.to_tensor()' if word == 'ragged' else 'tf.sparse.to_dense(x)'})"
            )
    if each is None or getattr(getattr(each, "dtype", None), "kind", "") == "O":
        what = "None" if each is None else "an array of Python objects"
        raise UserError(f"a batch has {what} where (inputs, labels) must be arrays of numbers")


def labels_of(inputs: Any, labels: Any, positions: tuple[int, ...] = ()) -> np.ndarray:
    """Returns a batch's labels, int [n]; a column [n, 1] is taken as such.

    Args:
      inputs: of the batch.
      labels: what is given for them.
      positions: of each example for which there are logits: labels are int [n, *positions] then.

    Raises:
      UserError: they are no whole numbers, or not as many as there are inputs.
    """
    whole = np.asarray(labels)
    if not positions or whole.shape[1:] != positions or not np.issubdtype(whole.dtype, np.integer):
        whole = numbers_of(labels)
    labels = whole
    shape = tf.nest.flatten(inputs)[0].shape
    if shape.rank == 0 or shape[0] != len(labels):
        raise UserError(
            f"a batch has inputs of shape {list(shape)} but {len(labels)} labels; it must be "
            "(inputs [n, ...], labels [n])"
        )
    return labels


def numbers_of(labels: Any) -> np.ndarray:
    """Returns labels of shape [n] or [n, 1] as int [n].

    Raises:
      UserError: they are something else; says what to make of it.
    """
    found = np.asarray(labels)
    column = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    if column.ndim == 1 and np.issubdtype(column.dtype, np.integer):
        return column
    number = np.issubdtype(column.dtype, np.number) or column.dtype == bool
    if not number:
        advice = "map each class to a number, e.g. numpy.unique(labels, return_inverse=True)[1]"
    elif column.ndim == 1 and (column == np.round(column)).all():
        advice = "turn them into whole numbers with labels.astype('int32')"
    elif column.ndim == 1:
        advice = "these are no numbers of classes, and scores are not taken for regression"
    elif column.ndim == 2 and ((column == 0) | (column == 1)).all() and (column.sum(1) == 1).all():
        advice = "turn one-hot labels into numbers with argmax(axis=1)"
    elif column.ndim == 2:
        advice = (
            "scores take one class for each example: of probabilities that is argmax(axis=1), of "
            "several labels an example there is none"
        )
    else:
        advice = "scores take one class for each example, not one for each of its pixels or steps"
    raise UserError(
        f"labels must be whole numbers of shape [n] or [n, 1], not {found.dtype} of shape "
        f"{list(found.shape)}; {advice}"
    )


def require_classes(labels: np.ndarray, classes: int) -> None:
    """Raises UserError unless the labels are numbers of classes."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise UserError(
            f"labels range from {labels.min()} to {labels.max()}, but the model has {classes} "
            f"outputs: labels must be 0 to {classes - 1}"
        )


def added(each: Iterable[list]) -> list[np.ndarray]:
    """Returns the sums of lists of arrays, which are as large as the model: never many at once."""
    total: list[np.ndarray] = []
    for values in each:
        if total:
            for t, value in zip(total, values, strict=True):
                t += np.asarray(value)
        else:
            total = [np.array(value) for value in values]
        del values
    return total


def ones(model: Any, batches: Any, dtype: Any) -> Any:
    """Returns inputs of ones for a model.

    Args:
      model: what they are for.
      batches: of which the first tells their shape, where the model does not know it.
      dtype: theirs.

    Raises:
      UserError: no one tells the shape.
    """
    specs = model.save_spec()
    if specs is None:
        if not batches:
            raise UserError(
                f"model {model.name!r} does not know the shape of its inputs; give "
                "batches, of which the first tells it"
            )
        shapes = tf.nest.map_structure(lambda x: np.shape(x)[1:], next(iter(batches))[0])
        return tf.ones((1, *shapes), dtype)
    (inputs, *_), _ = specs
    return tf.nest.map_structure(
        lambda x: tf.ones((x.shape[0] or 1, *x.shape[1:]), dtype), inputs
    )


@contextlib.contextmanager
def explained(model: Any, dtype: Any) -> Iterator[None]:
    """Within, a model that cannot be computed is a UserError, not what Keras makes of it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # autograph and Keras wrap what layers raise in their own
        text = str(error)
        if found := re.search(r"gradient registry has no entry for: (\w+)", text):
            raise UserError(
                f"model {model.name!r} has no second derivative: TensorFlow cannot "
                f"differentiate {found[1]}; use --scorer=snip"
            ) from error
        if isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
            raise
        frame = ("in user code", "File ", "Call arguments", "Exception encountered")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith(frame)]
        raise UserError(
            f"model {model.name!r} cannot be computed on these inputs in "
            f"{dtype.name}: {type(error).__name__}: {' '.join(lines)[:300]}"
        ) from error
