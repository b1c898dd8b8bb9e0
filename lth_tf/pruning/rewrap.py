"""Models with their layers exchanged: wrapped in masks, or out of them again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside
from lth_tf.pruning.slots import scope_of


def rewrap(model: Any, swap: Callable[[Any], Any]) -> tuple[Any, Callable[[], None]]:
    """Applies `swap` to every layer of a model, nested models included.

    Returns:
      The model, new or changed in place, and a function that undoes what was done in place.
    """
    done: dict[int, tuple[Any, Any]] = {}  # what is used twice is swapped once
    before: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []

    def exchange(value: Any) -> Any:
        if not _is_layer(value):
            return value
        if id(value) not in done:
            new = exchange_all(value) if isinstance(value, keras.Model) else swap(value)
            done[id(value)] = value, new  # the old one, too: its id must not be used again
        return done[id(value)][1]

    def exchange_all(model: Any) -> Any:
        if isinstance(model, keras.Sequential) or inside.is_graph_network(model):
            return _exchanged(model, exchange)
        old = {
            name: value
            for name, value in vars(model).items()
            if inside.is_tracked(model, value) and any(map(_is_layer, tf.nest.flatten(value)))
        }
        # What was traced with some layers must not be used with others.
        traced = inside.traced_functions(model)
        before.append((model, old, traced))
        new = {name: tf.nest.map_structure(exchange, value) for name, value in old.items()}
        _set_attributes(model, new, dict.fromkeys(traced))
        return model

    def put_back() -> None:
        for model, old, traced in before:
            _set_attributes(model, old, traced)

    try:
        with scope_of(model):
            return exchange_all(model), put_back
    except Exception:
        put_back()
        raise


def _is_layer(value: Any) -> bool:
    # Keras' metrics are layers, too.
    return isinstance(value, keras.layers.Layer) and not isinstance(value, keras.metrics.Metric)


def _set_attributes(model: Any, layers: dict[str, Any], traced: dict[str, Any]) -> None:
    # All are deleted first and set in their old order, because weights come in this order.
    for name in layers:
        delattr(model, name)
    for name, value in (layers | traced).items():
        setattr(model, name, value)


# A pruned model's plain one: the layers' first graph, so that layer.output belongs to its inputs.
_PLAIN: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _exchanged(model: Any, exchange: Callable[[Any], Any]) -> Any:
    """A functional or Sequential model of exchanged layers; the plain one is not made again."""
    known = _PLAIN.get(model)
    if known is None:
        new = _clone(model, exchange)
        _PLAIN[new] = model
    else:
        ours, theirs = (
            [v for v in each.layers if not isinstance(v, keras.layers.InputLayer)]
            for each in (model, known)
        )
        ours = list(map(exchange, ours))
        same = len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
        new = known if same else _clone(model, exchange)
    # What was traced before knows of no constraints, or of those that are gone.
    for each in (model, new):
        _set_attributes(each, {}, dict.fromkeys(inside.traced_functions(each)))
    return new


def _clone(model: Any, exchange: Callable[[Any], Any]) -> Any:
    """A functional or Sequential model of exchanged layers."""

    def clone(layer: Any) -> Any:
        if isinstance(layer, keras.layers.InputLayer):
            return type(layer).from_config(layer.get_config())
        return exchange(layer)

    new = keras.models.clone_model(model, clone_function=clone)
    own = [n for n in vars(type(model)) if not n.startswith("_") and n != "get_config"]
    if type(new) is not type(model) and own:
        raise UserError(
            f"{type(model).__name__} {model.name!r} has methods of its own ({', '.join(own)}), "
            "which its pruned copy would lack; let its __init__ take the arguments of keras.Model, "
            "or write the model with layers as attributes and a call method"
        )
    return new
