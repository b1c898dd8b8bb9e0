"""Moving statistics of BatchNormalization, taken anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from lth_tf.compat import keras, tf
from lth_tf.pruning.inside import layers_within


def normalised(model: Any) -> list[Any]:
    """Returns the layers of a model that keep moving statistics of batches, those within others."""
    found = [x for x in layers_within(model) if isinstance(x, keras.layers.BatchNormalization)]
    return list({id(layer): layer for layer in found}.values())


def take_anew(model: Any, inputs: Iterable[Any]) -> None:
    """Makes moving statistics the mean over batches of each batch's own.

    Networks as initialised have 0 and 1, which belong to no data; after weights were changed those
    kept belong to other weights.

    Args:
      model: a plain or pruned model; of its variables nothing else is changed.
      inputs: batches, as the network takes them.
    """
    layers = normalised(model)
    mine = {id(v) for layer in layers for v in (layer.moving_mean, layer.moving_variance)}
    before = [(v, v.numpy()) for v in model.non_trainable_variables if id(v) not in mine]
    momenta = [layer.momentum for layer in layers]
    try:
        for i, x in enumerate(inputs):
            for layer in layers:  # m <- m i / (i + 1) + b / (i + 1)
                layer.momentum = i / (i + 1)
            model(tf.convert_to_tensor(x), training=True)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for variable, value in before:
            variable.assign(value)


@contextlib.contextmanager
def anew(model: Any, inputs: Iterable[Any]) -> Iterator[None]:
    """Within, a model has moving statistics of these batches; see `take_anew`.

    Args:
      model, inputs: see there.
    """
    kept = [(v, v.numpy()) for x in normalised(model) for v in (x.moving_mean, x.moving_variance)]
    try:
        take_anew(model, inputs)
        yield
    finally:
        for variable, value in kept:
            variable.assign(value)
