"""What a mask cuts off: empty kernels, and weights that lie on no path from input to output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.compat import keras, tf
from lth_tf.masks import Mask
from lth_tf.pruning.inside import layers_within
from lth_tf.scorers.network import Network, passed_on


def connected(model: Any, mask: Mask) -> Mask:
    """Returns the part of a mask whose weights lie on a path from the input to an output.

    In a network of non-negative weights without biases, whose activations and
    normalisations are left out and whose max-pools average, w * dR/dw is positive exactly
    where an input reaches w and w reaches an output. Gates of recurrent layers are added up, where
    they multiply; embeddings put out ones. Weights are the mask's, each kernel
    divided by its largest number of inputs, so that nothing overflows.

    Args:
      model: a plain model; its weights do not matter.
      mask: kernel name -> 0/1 array.

    Returns:
      Kernel name -> uint8 array, at most the mask.
    """
    fixed: list[tuple[Any, str, Any]] = []
    for layer in layers_within(model):
        if isinstance(layer, _NORMALIZATION):
            fixed.append((layer, "call", passed_on))
        elif isinstance(layer, keras.layers.MaxPooling2D):
            fixed.append((layer, "call", _averaged(layer)))
        elif isinstance(layer, keras.layers.Embedding):
            fixed.append((layer, "call", _looked_up(layer)))
        elif isinstance(layer, keras.layers.RNN) and hasattr(layer.cell, "recurrent_kernel"):
            fixed.append((layer, "call", _recurrent(layer)))
        elif callable(getattr(layer, "activation", None)):
            fixed.append((layer, "activation", keras.activations.linear))
    network = Network(
        model, dtype="float64", others=tf.zeros_like, preprocessing=False, fixed=fixed
    )
    shares = {
        name: m / max(1, int(m.reshape(-1, m.shape[-1]).sum(0, dtype=np.int64).max()))
        for name, m in mask.items()
    }
    return {name: (flow > 0).astype(np.uint8) for name, flow in network.flow(shares).items()}


def collapse(mask: Mask, through: Mask) -> str:
    """Returns in words what `connected` found: the density in effect, and what is cut.

    Named are kernels that are empty, that have fewer weights than outputs, or of which
    no weight lies on a path.
    """
    density, effective = masks.density(mask), masks.density(through)
    text = f"density {density:.4%}, on a path from input to output {effective:.4%}"
    findings = {
        "empty": [n for n, m in mask.items() if not m.any()],
        "on no path": [n for n, m in mask.items() if m.any() and not through[n].any()],
        "fewer weights than outputs": [
            f"{n} ({masks.kept({n: m})} of {m.size})"
            for n, m in mask.items()
            if through[n].any() and masks.kept({n: m}) < m.shape[-1]
        ],
    }
    for what, names in findings.items():
        if names:
            text += f"\n  warning: {what}: {', '.join(names)}"
    return text


_NORMALIZATION = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
)


def _looked_up(layer: Any) -> Callable[[Any], Any]:
    return lambda inputs: tf.ones([*inputs.shape, layer.output_dim], tf.float64)


def _recurrent(layer: Any) -> Callable[..., Any]:
    def call(inputs: Any, mask: Any = None, training: Any = None, initial_state: Any = None) -> Any:
        units = layer.cell.units
        gates = layer.cell.kernel.shape[-1] // units
        kernel, recurrent = (
            tf.reduce_sum(tf.reshape(k, [-1, gates, units]), 1) / (2 * gates)
            for k in (layer.cell.kernel, layer.cell.recurrent_kernel)
        )
        state = tf.zeros([inputs.shape[0], units], inputs.dtype)
        states = []
        for x in tf.unstack(inputs, axis=1):
            state = x @ kernel + state @ recurrent
            states.append(state)
        return tf.stack(states, 1) if layer.return_sequences else state

    return call


def _averaged(layer: Any) -> Callable[[Any], Any]:
    def call(inputs: Any) -> Any:
        form = "NHWC" if layer.data_format == "channels_last" else "NCHW"
        return tf.nn.avg_pool2d(
            inputs, layer.pool_size, layer.strides, layer.padding.upper(), data_format=form
        )

    return call
