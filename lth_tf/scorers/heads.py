"""What a model ends in: logits, which scores are taken on, or something made of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.scorers import inside
from lth_tf.scorers.inside import Replacement


def without_probabilities(model: Any, *, sigmoid: bool = False) -> list[Replacement]:
    """Returns what makes a functional model that ends in a softmax put out its logits.

    Args:
      model: any model; of a subclassed one the end is not known.
      sigmoid: the same for one that ends in a sigmoid.
    """
    while isinstance(model, keras.Model) and model.outputs:
        if len(model.outputs) != 1:
            return []
        last = inside.made_by(model.outputs[0])
        if last is model or len(inside.calls_of(last)) > 1 and not isinstance(last, keras.Model):
            return []  # used elsewhere, too: not only the end
        model = last
    if isinstance(model, keras.layers.Softmax):
        return [(model, "call", lambda inputs, mask=None: inputs)]
    activation = getattr(model, "activation", None)
    if activation is keras.activations.softmax or (
        sigmoid and activation is keras.activations.sigmoid
    ):
        return [(model, "activation", keras.activations.linear)]
    return []


def last_operation(tensor: Any) -> str:
    """Returns the type of the operation that a tensor of a graph comes from, views aside."""
    while tensor.op.type in ("Cast", "Identity", "Reshape", "Squeeze"):
        tensor = tensor.op.inputs[0]
    return tensor.op.type


def classes_of(outputs: Any, operation: str, model: Any, positions: bool = False) -> int:
    """Returns the number of classes of a model that puts out logits.

    Args:
      outputs: of a batch.
      operation: the last one that they come from, see `last_operation`.
      model: for messages.
      positions: whether labels have the shape of its outputs but for their last axis.

    Raises:
      UserError: its outputs are no logits.
    """
    logits = outputs.numpy()
    if operation == "Sigmoid":
        raise UserError(
            f"model {model.name!r} ends in a sigmoid, {logits.shape[-1]} output(s) each of which "
            "is a probability by itself; scores are taken on logits, of which a softmax makes "
            "probabilities: build it with a linear output for each class, two where there was "
            "one sigmoid"
        )
    if not (logits.ndim == 2 or (positions and logits.ndim > 2)) or logits.shape[-1] < 2:
        raise UserError(
            f"model {model.name!r} puts out {list(logits.shape)}; scores need logits "
            "of shape [n, classes] with at least two classes"
        )
    if (logits >= 0).all() and np.allclose(logits.sum(-1), 1, atol=1e-4):
        raise UserError(
            f"model {model.name!r} ends in a softmax; scores are taken on logits: "
            "build it without the last activation"
        )
    return logits.shape[-1]


def require_one(outputs: Any, model: Any) -> None:
    """Raises UserError unless a model puts out a single tensor."""
    if not tf.is_tensor(outputs):
        raise UserError(
            f"model {model.name!r} puts out {len(tf.nest.flatten(outputs))} tensors; "
            "scores need one, the logits"
        )
