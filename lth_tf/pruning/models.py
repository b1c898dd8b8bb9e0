"""Models: prune and strip them, set their mask, check that what is pruned is zero.

`prune` wraps each layer that owns kernels in a `MaskedLayer`, which computes with mask x
kernel. Gradients are masked by that, and since `set_mask` zeroes the pruned weights and the
optimizer's slots for them, every update of a pruned weight is exactly zero, in `fit` as in
a loop of one's own.

The pruned model and the plain one share their layers: what one learns the other knows.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.compat import is_keras_3, keras, tf
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning import inside
from lth_tf.pruning.masked import MaskedLayer, select, unwrap, wrap
from lth_tf.pruning.names import Weight, named, weights
from lth_tf.pruning.slots import create_slots, probe, require_maskable, scope_of, slots_of


class InvariantError(RuntimeError):
    """A weight or optimizer slot is not zero where the mask is."""


# --- Wrapping and unwrapping -----------------------------------------------------------


def prune(model: Any) -> Any:
    """Returns the model with every prunable layer wrapped in a `MaskedLayer`, nothing pruned yet.

    Functional and Sequential models come back as a new model that shares all layers
    with the given one; a subclassed model is changed in place, attribute by attribute,
    and returned (of it Keras can save and load weights, into a pruned model of the same
    class, but not the whole). Compile the result before `fit`.

    Args:
      model: a built tf_keras model: functional, Sequential, nested or subclassed.

    Raises:
      UserError: a Keras 3 model, no model at all, one that is not built, has nothing
        prunable, is pruned already, or is made in a way in which masks would not hold.
    """
    require_model(model)
    layers = inside.layers_within(model)
    if is_pruned(model):
        raise UserError(f"model {model.name!r} is pruned already; use set_mask to change its mask")
    for layer in layers:
        if isinstance(layer.call, tf.types.experimental.PolymorphicFunction):
            raise UserError(
                f"the call of {type(layer).__name__} {layer.name!r} is a @tf.function, which would "
                "go on with the kernels it saw first; remove the decorator, fit compiles anyway"
            )
        if inside.holds_symbolic_loss(layer):
            raise UserError(
                f"model {model.name!r} was given losses or metrics of symbolic tensors (add_loss, "
                "add_metric), which Keras cannot copy; add them in the call of a layer"
            )
    return _rewrap(model, wrap)[0]


def require_model(model: Any) -> None:
    """Raises UserError unless `model` is a built tf_keras model, plain or pruned, with kernels."""
    if is_keras_3(model):
        raise UserError(
            f"{type(model).__name__} {getattr(model, 'name', '')!r} is a Keras 3 model; lth_tf "
            "prunes tf_keras models: build it with `import tf_keras as keras` (or import lth_tf "
            "before tensorflow.keras is touched), then copy the weights with set_weights"
        )
    if not isinstance(model, keras.Model):
        raise UserError(f"lth_tf takes a tf_keras model, not {type(model).__name__}")
    unbuilt = [
        layer.name
        for layer in inside.layers_within(model)
        if not layer.built
        and (layer is model or any(a.endswith("kernel_initializer") for a in vars(layer)))
    ]
    if unbuilt:
        raise UserError(
            f"model {model.name!r} is not built: the kernels of {', '.join(unbuilt)} do not exist "
            "yet; call it on a batch (or model.build(input_shape)) first"
        )
    found = named(model)
    if not any(w.kernel for w in found):
        raise UserError(
            f"model {model.name!r} has nothing to prune: none of its layers "
            f"({', '.join(type(layer).__name__ for layer in model.layers)}) has a kernel; a custom "
            "layer can name its own in get_prunable_weights()"
        )
    known = {id(w.variable) for w in found}
    if strangers := [v.name for v in model.trainable_variables if id(v) not in known]:
        raise UserError(
            f"model {model.name!r} trains {strangers}, which belong to no Keras layer (but to a "
            "tf.Module?); make that a keras.layers.Layer"
        )


def is_pruned(model: Any) -> bool:
    """Says whether a model has masks."""
    return any(isinstance(layer, MaskedLayer) for layer in inside.layers_within(model))


def strip(model: Any) -> Any:
    """Returns the plain model of a pruned one, its pruned weights exactly 0.0.

    The inverse of `prune`: a subclassed model is changed in place. The layers remain
    shared with the pruned model.

    Raises:
      InvariantError: a pruned weight is not zero.
    """
    check(model)
    return _rewrap(model, unwrap)[0]


@contextlib.contextmanager
def plain(model: Any) -> Iterator[Any]:
    """Within, the plain model of a pruned or plain one; a subclassed one is put back after.

    Raises:
      InvariantError: a pruned weight is not zero.
    """
    if not is_pruned(model):
        yield model
        return
    check(model)
    stripped, put_back = _rewrap(model, unwrap)
    try:
        yield stripped
    finally:
        put_back()


def _rewrap(model: Any, swap: Callable[[Any], Any]) -> tuple[Any, Callable[[], None]]:
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
            return _clone(model, exchange)
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


# --- Masks -----------------------------------------------------------------------------


def get_mask(model: Any) -> Mask:
    """Returns the mask of a pruned model: kernel name -> uint8 array, 1 = kept.

    Raises:
      UserError: the model is not pruned.
    """
    return {w.name: (w.masks[0].numpy() != 0).astype(np.uint8) for w in _masked(model)}


def set_mask(model: Any, mask: Any, optimizer: Any = None) -> None:
    """Puts a mask in force: sets it, and zeroes the pruned weights and their slots.

    Args:
      model: a pruned model.
      mask: kernel name -> array of the kernel's shape with values 0 and 1, for every
        kernel of the model; or a ticket, whose mask it is (its weights are `Rewind`'s to set).
      optimizer: whose slots to zero (default: the one the model is compiled with).
        They need not exist yet, unless they start at other values than 0 (Adagrad):
        then they are created.

    Raises:
      UserError: the model is not pruned, the names, shapes or values do not fit, or
        the optimizer's state does not survive masking.
    """
    found, mask = _masked(model), getattr(mask, "mask", mask)
    fit(mask, {w.name: tuple(w.variable.shape) for w in found}, "mask")
    for name, m in mask.items():
        if not np.isin(m, (0, 1)).all():
            raise UserError(f"the mask of {name!r} holds values other than 0 and 1")
    optimizer = optimizer or getattr(model, "optimizer", None)
    if optimizer is not None:
        require_maskable(optimizer)
        if not probe(optimizer).clean:
            create_slots(optimizer, model)
    slots = slots_of(optimizer, model) if optimizer is not None else {}
    for w in found:
        for variable in w.masks:
            variable.assign(np.asarray(mask[w.name], variable.dtype.as_numpy_dtype))
        for variable in (w.variable, *slots.get(w.name, ())):
            variable.assign(select(w.masks[0], variable))
    _SET[model] = masks_set(model) + 1


_SET: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def masks_set(model: Any) -> int:
    """Returns how often `set_mask` has put a mask in force, for what depends on the mask."""
    return _SET.get(model, 0)


def fit(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Makes sure that values have the names and shapes of a model's.

    Args:
      given: name -> array.
      shapes: name -> shape, of the model.
      what: what they are, for the sentence: 'mask'.

    Raises:
      UserError: a name is missing or unknown, or a shape another; says which.
    """
    if not isinstance(given, Mapping):
        raise UserError(
            f"a {what} is a dict of kernel name -> array, not {type(given).__name__}"
        )
    if missing := [n for n in shapes if n not in given]:
        raise UserError(f"the {what} lacks {missing}; the model has {list(shapes)}")
    if extra := [n for n in given if n not in shapes]:
        raise UserError(f"the {what} has {extra}, which the model has not: it has {list(shapes)}")
    for name, shape in shapes.items():
        try:
            found = tuple(np.shape(given[name]))
        except ValueError as error:  # of lists of different lengths
            raise UserError(f"the {what} of {name!r} is no array ({error})") from error
        if found != tuple(shape):
            raise UserError(
                f"the {what} of {name!r} has shape {found}, the model's is {tuple(shape)}"
            )


def check(model: Any, optimizer: Any = None) -> None:
    """Checks the invariant: zeros of the mask are zeros of the weights and of the slots.

    Raises:
      InvariantError: names the kernel, what is not zero, and how many entries.
    """
    found = _masked(model)
    slots = slots_of(optimizer, model) if optimizer is not None else {}
    for w in found:
        pruned = w.masks[0].numpy() == 0
        for variable in (w.variable, *slots.get(w.name, ())):
            # != 0 is true for NaN, too.
            wrong = int(np.count_nonzero(variable.numpy()[pruned] != 0))
            if wrong:
                raise InvariantError(
                    f"{wrong} of {int(pruned.sum())} pruned entries of {variable.name} are not "
                    "zero: something outside lth_tf wrote to them (an assign, load_weights or an "
                    "optimizer without set_mask); call set_mask(model, get_mask(model)) to repair"
                )


def _masked(model: Any) -> list[Weight]:
    if not isinstance(model, keras.layers.Layer):
        raise UserError(f"lth_tf takes a tf_keras model, not {type(model).__name__}")
    found = [w for w in named(model) if w.masks]
    if not found:
        raise UserError(f"model {model.name!r} is not pruned; call prune(model) first")
    return found


def assign(model: Any, values: Mapping[str, np.ndarray], mask: Mask | None = None) -> None:
    """Sets all weights of a model, masked; only `Rewind` and exporters need it.

    Args:
      model: plain or pruned.
      values: path -> array, for every weight of the model (see `weights`).
      mask: what to set to 0.0 of them.

    Raises:
      UserError: names or shapes do not fit.
    """
    variables = weights(model)
    fit(values, {n: tuple(v.shape) for n, v in variables.items()}, "set of weights")
    masked = masks.apply(mask or {}, {n: np.asarray(value) for n, value in values.items()})
    for name, variable in variables.items():
        dtype = inside.stored_dtype(variable).as_numpy_dtype
        variable.assign(masked[name].astype(dtype))
