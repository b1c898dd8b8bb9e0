"""What is prunable of a model, what is not and why, and how to select it by name."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside
from lth_tf.pruning.masked import MaskedLayer
from lth_tf.pruning.names import Weight, named


class Prunable(NamedTuple):
    """A row of the table that `prunable` returns.

    Attributes:
      name: a path, as in `pruning.weights`.
      shape: of the weight.
      prunable: whether `prune` masks it.
      why: the reason where it does not, else ''.
    """

    name: str
    shape: tuple[int, ...]
    prunable: bool
    why: str


def prunable(model: Any) -> list[Prunable]:
    """Returns a row for each trained weight of a plain or pruned model: prunable, or why not.

    Args:
      model: a built tf_keras model.

    Returns:
      Rows in the order of `pruning.weights`.
    """
    held = _held(model)
    return [
        Prunable(w.name, tuple(w.variable.shape), w.kernel, "" if w.kernel else _why(w, held))
        for w in named(model, every=True)
        if w.variable.trainable or w.kernel
    ]


def _held(model: Any) -> dict[int, list[tuple[Any, str]]]:
    """Variable -> (layer, attribute) that hold it, of layers that can be masked."""
    held: dict[int, list[tuple[Any, str]]] = {}
    for layer in inside.layers_within(model):
        if not isinstance(layer, (keras.Model, MaskedLayer)):
            for attribute, value in vars(layer).items():
                if isinstance(value, tf.Variable):
                    held.setdefault(id(value), []).append((layer, attribute))
    return held


def _why(weight: Weight, held: dict[int, list[tuple[Any, str]]]) -> str:
    if len(weight.variable.shape) < 2:
        return "rank below 2 (a bias or scale)"
    if isinstance(weight.owner, keras.Model):
        return "held by a model itself; give it a layer"
    found = held.get(id(weight.variable))
    if not found:
        return "no attribute of a layer (in a list?); set self.NAME = self.add_weight(...)"
    layer, attribute = found[0]
    if vars(layer).get("_chosen") is not None:
        return "not selected"
    if hasattr(layer, "get_prunable_weights"):
        return "not in its layer's get_prunable_weights()"
    return f"its attribute {attribute!r} does not end in 'kernel'; select it by name (select=)"


def choose(model: Any, patterns: Sequence[str]) -> None:
    """Has a model's layers remember which of their weights are prunable.

    Args:
      model: a built model, no layer of which is masked.
      patterns: of names; trained weights of rank 2 or more are looked at.

    Raises:
      UserError: a pattern fits none, or a weight that cannot be masked.
    """
    found = [w for w in named(model) if w.variable.trainable and len(w.variable.shape) >= 2]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(w.name, pattern) for w in found):
            raise UserError(
                f"select: {pattern!r} fits none of the trained weights of rank 2 or more of model "
                f"{model.name!r}: {', '.join(w.name for w in found)}"
            )
    held = _held(model)
    chosen: dict[int, set[str]] = {}
    for w in found:
        if any(fnmatch.fnmatchcase(w.name, pattern) for pattern in patterns):
            if id(w.variable) not in held:
                raise UserError(f"select: {w.name} cannot be masked: {_why(w, held)}")
            for layer, attribute in held[id(w.variable)]:
                chosen.setdefault(id(layer), set()).add(attribute)
    for layer in inside.layers_within(model):
        if not isinstance(layer, (keras.Model, MaskedLayer)):
            inside.set_untracked(layer, "_chosen", frozenset(chosen.get(id(layer), ())))


def warn(model: Any) -> None:
    """Warns where most of a pruned model's trained parameters are not prunable."""
    rows = prunable(model)
    sizes = [math.prod(row.shape) for row in rows]
    masked = sum(size for row, size in zip(rows, sizes, strict=True) if row.prunable)
    if 2 * masked < sum(sizes):
        out = [(size, row) for row, size in zip(rows, sizes, strict=True) if not row.prunable]
        first = sorted(out, key=lambda each: -each[0])[:3]
        warnings.warn(
            f"prune masks {masked:,} of {sum(sizes):,} trained parameters of model {model.name!r}; "
            "the largest of the others are "
            + "; ".join(f"{row.name} {row.shape}: {row.why}" for _, row in first)
            + " (lth_tf.prunable(model) lists all)",
            stacklevel=3,
        )
