"""What scorers ask of tf_keras and TensorFlow that these do not promise: one function each.

As in `lth_tf.pruning.inside`. A replacement is (layer, attribute, value), for `replaced`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from lth_tf.compat import keras, tf

Replacement = tuple[Any, str, Any]

_ABSENT = object()


@contextlib.contextmanager
def replaced(attributes: Iterable[Replacement]) -> Iterator[None]:
    """Within, the layers' attributes have other values; past Keras' tracking."""
    before: list[tuple[dict, str, Any]] = []
    try:
        for layer, attribute, value in attributes:
            held = layer.__dict__
            before.append((held, attribute, held.get(attribute, _ABSENT)))
            held[attribute] = value
        yield
    finally:
        for held, attribute, value in reversed(before):
            if value is _ABSENT:
                del held[attribute]
            else:
                held[attribute] = value


def _replacement(owner: Any, attribute: str, value: Any) -> Replacement:
    """A replacement of an attribute that there is; of another it would do nothing, in silence."""
    getattr(owner, attribute)
    return owner, attribute, value


def computing_in(layer: Any, dtype: Any) -> list[Replacement]:
    """Returns what makes a layer cast its inputs to a dtype and compute in it."""
    policy = keras.mixed_precision.Policy(dtype.name)
    return [
        _replacement(layer, "_dtype_policy", policy),
        _replacement(layer, "_compute_dtype_object", dtype),
    ]


def forgetting_losses(layer: Any) -> list[Replacement]:
    """Returns what keeps a layer from remembering the losses that its calls add."""
    _replacement(layer, "_eager_losses", [])  # makes the list, of which each thread has its own
    return [
        _replacement(layer, "_losses", []),
        _replacement(layer._thread_local, "_eager_losses", []),
    ]


def taking_inputs_as_they_are(functional: Any, cast: Callable[[Any], Any]) -> Replacement:
    """Returns what keeps a functional model from casting its inputs to the dtype it was built in.

    Args:
      functional: a functional or Sequential model.
      cast: what is done to inputs of floating point instead: tensor -> tensor.
    """

    def conform(tensor: Any, ref_input: Any) -> Any:
        found = type(functional)._conform_to_reference_input(functional, tensor, ref_input)
        if not found.dtype.is_floating:
            return found
        return tf.ensure_shape(tf.reshape(cast(tensor), tf.shape(found)), found.shape)

    return _replacement(functional, "_conform_to_reference_input", conform)


def calls_of(layer: Any) -> list[dict[str, Any]]:
    """Returns the keyword arguments of each call of a layer on symbolic inputs."""
    return [node.call_kwargs for node in layer._inbound_nodes]


def made_by(tensor: Any) -> Any:
    """Returns the layer whose output a symbolic tensor is."""
    return tensor._keras_history.layer


def function_of(layer: Any) -> tuple[str, ...]:
    """Returns the attribute that has what a layer computes, where that is one function."""
    wraps = isinstance(layer, keras.layers.Lambda) or type(layer).__name__ == "TFOpLambda"
    if wraps and callable(getattr(layer, "function", None)):
        return ("function",)
    return ()


def omit_tracing_warning(function: Any) -> None:
    """Keeps TensorFlow from warning that a tf.function is traced often."""
    if not function._omit_frequent_tracing_warning:
        function._omit_frequent_tracing_warning = True
