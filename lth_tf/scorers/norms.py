"""Normalisations, computed so that their second derivatives are right.

Keras' own would not do, because `tf.nn.moments` stops the gradient through the mean inside
the variance: right for the gradient, where that term is zero, wrong for the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning.inside import is_graph_network, layers_within
from lth_tf.scorers import inside


def batch_norm(layer: Any, train: bool) -> Callable[..., Any]:
    """Returns what replaces a BatchNormalization's `call`.

    (x - m) / sqrt(v + epsilon) * gamma + beta (Ioffe and Szegedy 2015, algorithm 1); m and v
    are those of the batch where `train`, else the moving ones.

    Raises:
      UserError: it is a kind of batch normalisation that is not known here.
    """
    known = (keras.layers.BatchNormalization, keras.layers.experimental.SyncBatchNormalization)
    if type(layer) not in known or layer.renorm:
        raise UserError(
            f"layer {layer.name!r} is a {type(layer).__name__}, a batch normalisation that "
            "lth_tf does not know; use keras.layers.BatchNormalization"
        )

    @tf.autograph.experimental.do_not_convert
    def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        if mask is not None:
            raise UserError(f"layer {layer.name!r} normalises a masked batch: not supported")
        rank = len(inputs.shape)
        own = sorted(axis % rank for axis in tf.nest.flatten(layer.axis))
        shape = [inputs.shape[i] if i in own else 1 for i in range(rank)]

        def spread(value: Any) -> Any:
            return value if own == [rank - 1] else tf.reshape(value, shape)

        zeros = tf.zeros_like(layer.moving_mean)
        gamma = spread(zeros + 1 if layer.gamma is None else layer.gamma)
        beta = spread(zeros if layer.beta is None else layer.beta)
        if not train:
            factor = gamma * tf.math.rsqrt(spread(layer.moving_variance) + layer.epsilon)
            return inputs * factor + (beta - spread(layer.moving_mean) * factor)
        axes = [i for i in range(rank) if i not in own]
        centred = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        return centred * (gamma * tf.math.rsqrt(variance + layer.epsilon)) + beta

    return call


def layer_norm(layer: Any) -> Callable[..., Any]:
    """Returns what replaces a LayerNormalization's `call`: as `batch_norm`, for each example."""

    @tf.autograph.experimental.do_not_convert
    def call(inputs: Any) -> Any:
        rank = len(inputs.shape)
        axes = sorted(axis % rank for axis in tf.nest.flatten(layer.axis))
        shape = [inputs.shape[i] if i in axes else 1 for i in range(rank)]
        centred = inputs - tf.reduce_mean(inputs, axes, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), axes, keepdims=True)
        outputs = centred * tf.math.rsqrt(variance + layer.epsilon)
        if layer.scale:
            outputs *= tf.reshape(layer.gamma, shape)
        return outputs + tf.reshape(layer.beta, shape) if layer.center else outputs

    return call


def frozen(model: Any) -> set[int]:
    """Returns ids of the layers that a model, or one in it, was built to call in eval mode."""
    if not is_graph_network(model):
        return set()
    found: set[int] = set()
    for layer in model.layers:
        if any(arguments.get("training") is False for arguments in inside.calls_of(layer)):
            found |= {id(x) for x in layers_within(layer)}
        elif isinstance(layer, keras.Model):
            found |= frozen(layer)
    return found


def refuse_moments(graph: Any, model: Any) -> None:
    """Raises UserError if a model's graph takes moments whose second derivative is wrong."""
    for op in graph.get_operations():
        # Those in the gradient of a fused normalisation are in their place.
        forward = not op.name.startswith("gradient_tape")
        if forward and op.type == "StopGradient" and any(
            c.type == "SquaredDifference" for c in op.outputs[0].consumers()
        ):
            raise UserError(
                f"model {model.name!r} takes moments with tf.nn.moments ({op.name}), "
                "whose second derivative is wrong in TensorFlow: it stops the gradient through "
                "the mean; use BatchNormalization or LayerNormalization, which are computed "
                "without it, or --scorer=snip"
            )
