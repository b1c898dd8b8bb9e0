"""What a data set in memory has to be, checked where it enters."""

from __future__ import annotations

from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.tasks import TASKS


def checked(dataset: Any) -> dict[str, np.ndarray]:
    """Returns the arrays of a data set as they are needed: field -> array.

    Args:
      dataset: see `datasets.Dataset`.

    Raises:
      UserError: they do not fit each other, or nothing can be learnt of them.
    """
    name, parts = dataset.name, list[np.ndarray]()
    for part, inputs, labels in (
        ("train", dataset.train_inputs, dataset.train_labels),
        ("test", dataset.test_inputs, dataset.test_labels),
    ):
        inputs, labels = _array(name, part, inputs), np.asarray(labels)
        if len(inputs) != len(labels if labels.ndim else labels[None]):
            raise UserError(
                f"data set {name!r} has {len(inputs):,} {part} inputs and {labels.size:,} labels; "
                "give as many of both"
            )
        if task := TASKS.get(dataset.task):
            labels = task.checked(name, part, labels, dataset.classes, inputs.shape)
        parts += [inputs, labels]
    train, train_labels, test, test_labels = parts
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise UserError(
            f"data set {name!r} has training inputs of shape {list(train.shape[1:])} and type "
            f"{train.dtype}, but test inputs of {list(test.shape[1:])} and {test.dtype}; give "
            "both alike"
        )
    _require_moments(dataset, train)
    return {
        "train_inputs": train, "train_labels": train_labels,
        "test_inputs": test, "test_labels": test_labels,
    }  # fmt: skip


def _array(name: str, part: str, given: Any) -> np.ndarray:
    inputs = np.asarray(given)
    if inputs.ndim < 2 or not inputs.size:
        raise UserError(
            f"data set {name!r} has {part} inputs of shape {list(inputs.shape)}; give [n, ...], "
            "with n and all sides at least 1"
        )
    if inputs.dtype.kind not in "uif":
        raise UserError(
            f"data set {name!r} has {part} inputs of type {inputs.dtype}; give uint8 for images, "
            "floats or integers"
        )
    if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
        bad = int(np.argwhere(~np.isfinite(inputs))[0][0])
        raise UserError(
            f"data set {name!r} has {part} inputs that are NaN or infinite, the first in example "
            f"{bad}; leave such examples out"
        )
    return inputs


def _require_moments(dataset: Any, train: np.ndarray) -> None:
    for what in ("mean", "std"):
        values = np.asarray(getattr(dataset, what), np.float64)
        if values.ndim != 1 or len(values) not in (1, train.shape[-1]):
            raise UserError(
                f"data set {dataset.name!r} has a {what} of {values.size} number(s); give one, or "
                f"one for each of the {train.shape[-1]} entries of the last axis"
            )
        if not np.isfinite(values).all() or (what == "std" and not (values > 0).all()):
            allowed = "finite numbers above 0" if what == "std" else "finite numbers"
            raise UserError(
                f"data set {dataset.name!r} has the {what} {values.tolist()}; give {allowed}"
            )
