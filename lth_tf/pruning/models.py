"""Models: prune and strip them, set their mask, check that what is pruned is zero.

`prune` wraps each layer that owns kernels in a `MaskedLayer`, which computes with mask x
kernel. Gradients are masked by that, and since `set_mask` zeroes the pruned weights and the
optimizer's slots for them, every update of a pruned weight is exactly zero, in `fit` as in
a loop of one's own.

The pruned model and the plain one share their layers: what one learns the other knows.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning import inside, selection, walls
from lth_tf.pruning.masked import InvariantError, MaskedLayer, select, unwrap, wrap
from lth_tf.pruning.names import Weight, kernels, named, weights
from lth_tf.pruning.rewrap import rewrap
from lth_tf.pruning.slots import (
    create_slots,
    inner_optimizer,
    require_maskable,
    slots_for,
)

# --- Wrapping and unwrapping -----------------------------------------------------------


def prune(model: Any, select: str | Sequence[str] | None = None, *, wall: bool = True) -> Any:
    """Returns the model with every prunable layer wrapped in a `MaskedLayer`, nothing pruned yet.

    Functional and Sequential models come back as a new model that shares all layers
    with the given one; a subclassed model is changed in place, attribute by attribute,
    and returned (of it Keras can save and load weights, into a pruned model of the same
    class, but not the whole). Compile the result before `fit`.

    Layers that are masked already, as those of a pruned trunk under a new head, stay so.
    Warns where most of the trained parameters are left out; `prunable` says of each why.

    Args:
      model: a built tf_keras model: functional, Sequential, nested or subclassed.
      select: patterns ('*', '?') of names in `weights`: what to prune of the trained
        weights of rank 2 or more, whatever their attributes are called. It is remembered
        by the layers. Default: what was selected before, else see `kernels`.
      wall: whether optimizers are to put mask x kernel and mask x slots back after each
        update, so that kernels read past their layer (a tied layer, a closure) stay
        masked, too.

    Raises:
      UserError: a Keras 3 model, no model at all, one that is not built, has nothing
        prunable, is pruned already, shares kernels with another pruned model, or is made
        in a way in which masks would not hold.
    """
    require_model(model)
    if select is not None:
        selection.choose(model, [select] if isinstance(select, str) else list(select))
    layers = inside.layers_within(model)
    if is_pruned(model) and not any(w.kernel and not w.masks for w in named(model, every=True)):
        raise UserError(f"model {model.name!r} is pruned already; use set_mask to change its mask")
    for layer in layers:
        if inside.is_revived(layer):
            raise UserError(
                f"layer {layer.name!r} was read from a SavedModel without its class, as functions "
                "that go on with its kernels as they are; load it with its class "
                "(custom_objects=, or keras.saving.register_keras_serializable)"
            )
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
    taken = [w.name for w in named(model, every=True) if not w.masks and walls.wall_of(w.variable)]
    if taken:
        raise UserError(
            f"{', '.join(taken)} of model {model.name!r} are masked by another pruned model of the "
            "same layers, whose zeros they have: strip that one first, or prune a copy "
            "(keras.models.clone_model, then set_weights)"
        )
    pruned = rewrap(model, functools.partial(wrap, wall=wall))[0]
    if select is None:
        selection.warn(pruned)
    return pruned


def require_model(model: Any) -> None:
    """Raises UserError unless `model` is a built tf_keras model, plain or pruned, with kernels."""
    inside.require_layer(model)
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
    found = named(model, every=True)
    if not any(w.kernel for w in found):
        raise UserError(
            f"model {model.name!r} has nothing to prune: none of its layers "
            f"({', '.join(type(layer).__name__ for layer in model.layers)}) has a kernel; a custom "
            "layer can name its own in get_prunable_weights(), or prune(model, select=...) by name"
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

    The inverse of `prune`: it returns the model that `prune` was given, where that is
    still as it was; a subclassed model is changed in place. The layers remain shared with
    the pruned model, but optimizers no longer hold their pruned weights at 0.0: to train
    the pruned model on, call `set_mask` again.

    Raises:
      InvariantError: a pruned weight is not zero, or another mask is in force than was set.
    """
    check(model)
    held = [w.variable for w in named(model) if w.masks]
    stripped = rewrap(model, unwrap)[0]
    walls.take_down(held)
    return stripped


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
    stripped, put_back = rewrap(model, unwrap)
    try:
        yield stripped
    finally:
        put_back()


def slots_of(optimizer: Any, model: Any) -> dict[str, list[Any]]:
    """Returns kernel name -> the optimizer's variables of its shape (moments, averages)."""
    return {name: slots_for(optimizer, kernel) for name, kernel in kernels(model).items()}


# --- Masks -----------------------------------------------------------------------------


def mask_variables(model: Any) -> list[tuple[Any, Any]]:
    """Returns (kernel, mask) for each kernel of a pruned model, both as variables."""
    return [(w.variable, w.masks[0]) for w in _masked(model)]


def get_mask(model: Any) -> Mask:
    """Returns the mask of a pruned model: kernel name -> uint8 array, 1 = kept.

    Raises:
      UserError: the model is not pruned.
    """
    return {w.name: (w.masks[0].numpy() != 0).astype(np.uint8) for w in _masked(model)}


def set_mask(model: Any, mask: Any, optimizer: Any = None, *, staying: Any = None) -> None:
    """Puts a mask in force: sets it, and zeroes the pruned weights and their slots.

    Args:
      model: a pruned model.
      mask: kernel name -> array of the kernel's shape with values 0 and 1, for every
        kernel of the model; or a ticket, whose mask it is (its weights are `Rewind`'s to set).
      optimizer: whose slots to zero (default: those that the model has, as its compiled
        one and as attributes). They need not exist yet: of other optimizers, and where
        the model is compiled later, slots are zeroed in the first step.
      staying: kernel name -> array, 0 where a kept weight and its slots start at zero, too.

    Raises:
      UserError: the model is not pruned, the names, shapes or values do not fit, or
        the optimizer's state does not survive masking.
    """
    found, mask = _masked(model), getattr(mask, "mask", mask)
    fit(mask, {w.name: tuple(w.variable.shape) for w in found}, "mask")
    for name, m in ((name, np.asarray(m)) for name, m in mask.items()):
        if m.max(initial=0) > 1 if m.dtype == np.uint8 else not np.isin(m, (0, 1)).all():
            raise UserError(f"the mask of {name!r} holds values other than 0 and 1")
    optimizers = optimizers_of(model) if optimizer is None else [optimizer]
    several = len(optimizers_of(model)) > 1  # each trains a part, which is not known yet
    for each in optimizers:
        if not require_maskable(each).clean and not several:  # slots that do not start at 0
            create_slots(each, model)
    for w in found:
        for variable in w.masks:
            variable.assign(np.asarray(mask[w.name], variable.dtype.as_numpy_dtype))
        slots = [slot for each in optimizers for slot in slots_for(each, w.variable)]
        stays = w.masks[0] if staying is None else tf.constant(staying[w.name])
        for variable in (w.variable, *slots):
            variable.assign(select(stays, variable))
    for layer in _masked_layers(model):
        layer.put_up_walls()
        layer.note()
    _guard(model)
    _SET[model] = masks_set(model) + 1


def _guard(model: Any) -> None:
    """Has `save_weights` save the masks only if they are those that were put in force.

    TensorFlow's format asks no layer; those of Keras ask each `MaskedLayer` all the same.
    """
    original = model.save_weights
    if hasattr(original, "guarded"):
        return

    @functools.wraps(original)
    def save_weights(*args: Any, **kwargs: Any) -> Any:
        for layer in _masked_layers(model):
            layer.require_noted()
        return original(*args, **kwargs)

    save_weights.guarded = True  # type: ignore[attr-defined]
    inside.set_untracked(model, "save_weights", save_weights)


_SET: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def optimizers_of(model: Any) -> list[Any]:
    """Returns the optimizers that a model has: the one it is compiled with, and attributes."""
    inside.require_layer(model)
    held: list[Any] = []
    for value in vars(model).values():
        many = value.values() if isinstance(value, dict) else value
        held += many if isinstance(value, (list, tuple, dict)) else [value]
    found = [value for value in held if inside.is_optimizer(value)]
    first = getattr(model, "optimizer", None)
    found = [*([] if first is None else [first]), *found]
    inner = {id(inner_optimizer(each)) for each in found if inner_optimizer(each) is not each}
    return list({id(each): each for each in found if id(each) not in inner}.values())


def note(model: Any) -> None:
    """Takes the mask that a model has for the one in force, where `set_mask` was not called yet."""
    for layer in _masked_layers(model):
        if not layer.noted:
            layer.note()


def _masked_layers(model: Any) -> list[MaskedLayer]:
    return [layer for layer in inside.layers_within(model) if isinstance(layer, MaskedLayer)]


def masks_set(model: Any) -> int:
    """Returns how often `set_mask` has put a mask in force, for what depends on the mask."""
    inside.require_layer(model)
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

    And the mask is the one that `set_mask` put in force.

    Raises:
      InvariantError: names the kernel, what is not zero, and how many entries.
    """
    found = _masked(model)
    for layer in _masked_layers(model):
        layer.require_noted()
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
