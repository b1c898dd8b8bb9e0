"""Masks that hold: `prune` wraps a model's prunable layers so that pruned weights stay 0.0.

Each layer that owns kernels is wrapped in a `MaskedLayer`, in whose `call` the layer
sees mask x kernel instead of the kernel. The gradient of any loss is then masked by
the chain rule, and since `set_mask` zeroes the pruned weights and the optimizer's
slots for them, every update of a pruned weight is exactly zero, in `fit` as in a loop
of one's own.

The pruned model and the plain one share their layers: what one learns the other knows.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import json
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lth_tf import masks
from lth_tf.compat import PruneLowMagnitude, is_keras_3, keras, tf
from lth_tf.errors import UserError
from lth_tf.masks import Mask


class InvariantError(RuntimeError):
    """A weight or optimizer slot is not zero where the mask is."""


@keras.saving.register_keras_serializable(package="lth_tf")
class MaskedLayer(PruneLowMagnitude):
    """A layer that computes with mask x kernel.

    Keeps the variables and the interface of tfmot's `PruneLowMagnitude` (so that
    `strip_pruning`, `prune_scope`, `PruningSummaries` and saving work) but not its
    engine: the mask changes only when `set_mask` changes it.

    Args:
      layer: any layer; all kernels that it or its sublayers hold are masked.
      masks: the kernels' shapes.

    Attributes:
      pruning_vars: list of (kernel, mask, threshold) variables; the mask has the
        kernel's shape and holds 0 or 1, the threshold is always 0.
    """

    def __init__(self, layer: Any, masks: Sequence[Sequence[int]], **kwargs: Any):
        kwargs["name"] = f"masked_{layer.name}"
        kwargs.setdefault("dtype", layer._dtype_policy)
        # tfmot's own __init__ would refuse layers that it does not know.
        super(PruneLowMagnitude, self).__init__(layer, **kwargs)
        # Keras must treat this layer as it treats the one inside.
        self._call_spec = layer._call_spec
        self._autocast = layer._autocast
        self.supports_masking = layer.supports_masking
        # Past Keras' tracking: the kernels belong to the layer and are saved with it.
        self.__dict__["_shapes"] = [tuple(shape) for shape in masks]
        self.__dict__["pruning_vars"] = []
        self.__dict__["_hosts"] = []
        if not hasattr(self, "_batch_input_shape") and hasattr(layer, "_batch_input_shape"):
            self._batch_input_shape = layer._batch_input_shape

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer where that is still to be done, and the mask variables."""
        super(PruneLowMagnitude, self).build(input_shape)
        # h5 wants names that are unique in a model; checkpoints, which want them to be the same
        # in every process, do not see the scope.
        with tf.name_scope(self.name):
            self.pruning_step = self.add_weight(
                "pruning_step",
                initializer=keras.initializers.Constant(-1),
                dtype=tf.int64,
                trainable=False,
            )
            self.__dict__["_masks"] = [
                [
                    self.add_weight(
                        name if i == 0 else f"{name}_{i}",
                        size,
                        initializer=initial,
                        trainable=False,
                        aggregation=tf.VariableAggregation.MEAN,
                        experimental_autocast=False,
                    )
                    for name, size, initial in (("mask", shape, "ones"), ("threshold", (), "zeros"))
                ]
                for i, shape in enumerate(self._shapes)
            ]
        self._join()

    def _join(self) -> None:
        """Joins the masks with their kernels, if the kernels exist."""
        hosts = _hosts(self.layer)
        kernels = list({id(kernel): kernel for _, _, kernel in hosts}.values())
        if [tuple(kernel.shape) for kernel in kernels] == self._shapes:
            self.pruning_vars += [(k, *m) for k, m in zip(kernels, self._masks, strict=True)]
            masks = {id(kernel): mask for kernel, mask, _ in self.pruning_vars}
            self._hosts += [(*host, masks[id(host[-1])]) for host in hosts]

    @contextlib.contextmanager
    def _masked(self) -> Iterator[None]:
        """Within, the owners' kernels are mask x kernel, in the dtype they compute in."""
        masked = []
        try:
            for owner, attribute, kernel, mask in self._hosts:
                value = _select(mask, kernel)
                if hasattr(kernel, "true_dtype"):
                    value = tf.cast(value, owner.compute_dtype)
                # Past Keras' __setattr__, which would untrack the variable.
                owner.__dict__[attribute] = value
                masked.append((owner, attribute, value))
            yield
            if any(owner.__dict__[attribute] is not value for owner, attribute, value in masked):
                raise UserError(
                    f"layer {self.layer.name!r} waits for the other replicas in the middle of its "
                    "call (synchronized BatchNormalization?), which mixes up their masked kernels; "
                    "make it a keras.Model, so that its layers are masked one by one"
                )
        finally:
            for owner, attribute, kernel, _ in self._hosts:
                owner.__dict__[attribute] = kernel

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer on masked kernels."""
        if not self._hosts:
            # A loaded layer may make its sublayers' kernels in its first call.
            self.layer.call(*args, **kwargs)
            self._join()
        _mask_regularizers(self._hosts)
        with self._masked():
            outputs = self.layer.call(*args, **kwargs)
        if self.layer._activity_regularizer:  # as Layer.__call__ would
            self.layer._handle_activity_regularization(None, outputs)
        return outputs

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Delegates Keras' sequence masking, which has nothing to do with pruning."""
        return self.layer.compute_mask(inputs, mask)

    def reset_states(self) -> None:
        """Delegates to a stateful recurrent layer."""
        self.layer.reset_states()

    @property
    def pruning_obj(self) -> Any:
        """What tfmot's UpdatePruningStep callback calls at the end of an epoch."""
        return self

    def weight_mask_op(self) -> None:
        """Zeroes the pruned weights, which they are anyway."""
        for kernel, mask, _ in self.pruning_vars:
            kernel.assign(_select(mask, kernel))

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration; the masks are variables and saved as such."""
        config = super(PruneLowMagnitude, self).get_config()
        return {**config, "masks": [list(shape) for shape in self._shapes]}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MaskedLayer:
        """Returns the layer that `get_config` described."""
        layer = dict(config["layer"])
        # From h5 and SavedModel Keras looks for registered classes under this key.
        layer["class_name"] = layer.get("registered_name") or layer["class_name"]
        layer = keras.layers.deserialize(layer, custom_objects)
        return cls(**{**config, "layer": layer})


def _select(mask: Any, kernel: Any) -> Any:
    """mask x kernel; a selection, because a product keeps NaN and -0.0."""
    value = kernel.read_value()
    return tf.where(mask != 0, value, tf.zeros([], value.dtype))


def _hosts(layer: Any) -> list[tuple[Any, str, Any]]:
    """(owner, attribute, variable) of all kernels that a layer and its sublayers hold.

    Not those that a model holds itself: models are not wrapped, their layers are.
    """
    owners = [
        x for x in layer._flatten_layers() if not isinstance(x, (keras.Model, MaskedLayer))
    ]
    choosy = [x for x in owners if hasattr(x, "get_prunable_weights")]
    named = {id(v): (x, v) for x in choosy for v in x.get_prunable_weights()}
    found = [
        (owner, attribute, value)
        for owner in owners
        for attribute, value in vars(owner).items()
        if isinstance(value, tf.Variable)
        and (
            id(value) in named
            or (
                not any(owner is x for x in choosy)
                and attribute.endswith("kernel")
                and value.trainable
                and len(value.shape) >= 2
            )
        )
    ]
    for owner, variable in named.values():
        if not any(variable is v for _, _, v in found):
            raise UserError(
                f"layer {owner.name!r} names {variable.name} in get_prunable_weights(), but no "
                "layer has it as an attribute (self.w = self.add_weight(...)), as pruning needs"
            )
    return found


_ELEMENTWISE = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def _mask_regularizers(hosts: list[tuple]) -> None:
    """Makes weight regularizers see the masked kernel.

    On the raw one some (orthogonality, for one) have gradients at pruned weights. Done
    at every call, because `strip` undoes it for the plain model, which shares the layers.
    Keras keeps such a loss as partial(tag, partial(loss, variable)).
    """
    for owner, _, kernel, mask in hosts:
        for i, loss in enumerate(owner._callable_losses):
            inner = loss.args[0] if isinstance(loss, functools.partial) and loss.args else None
            if not (isinstance(inner, functools.partial) and any(a is kernel for a in inner.args)):
                continue
            regularizer = inspect.getclosurevars(inner.func).nonlocals.get("regularizer")
            if type(regularizer) not in _ELEMENTWISE and loss.func is not _masked_loss:
                masked = functools.partial(_masked_loss, inner, mask, kernel)
                masked.plain = loss  # type: ignore[attr-defined]
                owner._callable_losses[i] = masked


def _masked_loss(inner: functools.partial, mask: Any, kernel: Any) -> Any:
    loss = inner.func(_select(mask, kernel))
    loss._unconditional_loss = True  # as Keras marks losses that no inputs enter
    return loss


# --- Names -----------------------------------------------------------------------------


class _Weight(NamedTuple):
    name: str
    variable: Any
    masks: list[Any]  # the mask variables: none, or one for each MaskedLayer it is used in
    kernel: bool
    owner: Any


def _weights(model: Any) -> list[_Weight]:
    """A model's own weights, then those of its children, each under a unique path."""
    masks: dict[int, list] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, MaskedLayer):
            for kernel, mask, _ in layer.pruning_vars:
                masks.setdefault(id(kernel), []).append(mask)
    prunable = {id(kernel) for _, _, kernel in _hosts(model)}
    found: list[_Weight] = []
    seen: set[int] = set()
    taken: set[str] = set()

    def unique(path: str) -> str:
        name, n = path, 0
        while name in taken:
            n += 1
            name = f"{path}_{n}"
        taken.add(name)
        return name

    def walk(layer: Any, path: str) -> None:
        seen.add(id(layer))
        for variable in [*layer._trainable_weights, *layer._non_trainable_weights]:
            if id(variable) not in seen:
                seen.add(id(variable))
                name = unique(path + variable.name.split("/")[-1].split(":")[0])
                own = masks.get(id(variable), [])
                found.append(_Weight(name, variable, own, id(variable) in prunable, layer))
        for child in layer._flatten_layers(recursive=False, include_self=False):
            child = child.layer if isinstance(child, MaskedLayer) else child
            if id(child) not in seen:
                walk(child, unique(path + _segment(child)) + "/")

    walk(model, "")
    return found


def _segment(layer: Any) -> str:
    """A layer's name, without the number if Keras made it up.

    'dense_3' counts the layers of the process; here they are numbered by their place.
    """
    kind = "Model" if type(layer).__name__ == "Functional" else type(layer).__name__
    snake = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
    snake = f"private{snake}" if snake.startswith("_") else snake
    automatic = re.fullmatch(rf"((?:forward_|backward_)?{snake})(_\d+)?", layer.name)
    return automatic[1] if automatic else layer.name


def weights(model: Any) -> dict[str, Any]:
    """Returns all variables of a plain or pruned model, masks aside: unique path -> variable.

    Layers that nobody named ('dense_3') appear under their place in the model
    ('dense', 'dense_1', ...), which is the same in every process.
    """
    return {w.name: w.variable for w in _weights(model)}


def kernels(model: Any) -> dict[str, Any]:
    """Returns the prunable variables of a plain or pruned model: unique path -> variable.

    Prunable are the kernels of dense, convolutional, recurrent and attention layers
    (trainable attributes called 'kernel' or '..._kernel', of rank 2 or more); of a custom
    layer with a method `get_prunable_weights()`, the attributes that it returns. Biases,
    normalisation and embeddings are not, nor what a model holds without a layer.
    """
    return {w.name: w.variable for w in _weights(model) if w.kernel}


def kinds(model: Any) -> dict[str, str]:
    """Returns for each kernel 'conv', 'dense' or 'output' (the last one)."""
    found = [w for w in _weights(model) if w.kernel]
    kind = {w.name: "conv" if "Conv" in type(w.owner).__name__ else "dense" for w in found}
    if found:
        kind[found[-1].name] = "output"
    return kind


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
    layers = list(model._flatten_layers())
    if is_pruned(model):
        raise UserError(f"model {model.name!r} is pruned already; use set_mask to change its mask")
    for layer in layers:
        if isinstance(layer.call, tf.types.experimental.PolymorphicFunction):
            raise UserError(
                f"the call of {type(layer).__name__} {layer.name!r} is a @tf.function, which would "
                "go on with the kernels it saw first; remove the decorator, fit compiles anyway"
            )
        if type(layer).__name__ in ("AddLoss", "AddMetric"):
            raise UserError(
                f"model {model.name!r} was given losses or metrics of symbolic tensors (add_loss, "
                "add_metric), which Keras cannot copy; add them in the call of a layer"
            )
    return _rewrap(model, _wrap)[0]


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
    layers = list(model._flatten_layers())
    unbuilt = [
        layer.name
        for layer in layers
        if not layer.built
        and (layer is model or any(a.endswith("kernel_initializer") for a in vars(layer)))
    ]
    if unbuilt:
        raise UserError(
            f"model {model.name!r} is not built: the kernels of {', '.join(unbuilt)} do not exist "
            "yet; call it on a batch (or model.build(input_shape)) first"
        )
    found = _weights(model)
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
    return any(isinstance(layer, MaskedLayer) for layer in model._flatten_layers())


def strip(model: Any) -> Any:
    """Returns the plain model of a pruned one, its pruned weights exactly 0.0.

    The inverse of `prune`: a subclassed model is changed in place. The layers remain
    shared with the pruned model.

    Raises:
      InvariantError: a pruned weight is not zero.
    """
    check(model)
    return _rewrap(model, _unwrap)[0]


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
    stripped, put_back = _rewrap(model, _unwrap)
    try:
        yield stripped
    finally:
        put_back()


def _wrap(layer: Any) -> Any:
    shapes = {id(kernel): kernel.shape for _, _, kernel in _hosts(layer)}
    if not shapes:
        return layer
    wrapped = MaskedLayer(layer, list(shapes.values()))
    wrapped.build(None)
    return wrapped


def _unwrap(layer: Any) -> Any:
    if not isinstance(layer, MaskedLayer):
        return layer
    for owner, *_ in layer._hosts:
        owner._callable_losses = [getattr(f, "plain", f) for f in owner._callable_losses]
    return layer.layer


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
        if isinstance(model, keras.Sequential) or model._is_graph_network:
            return _clone(model, exchange)
        tracked = {id(value) for value in model._self_tracked_trackables}
        old = {
            name: value
            for name, value in vars(model).items()
            if id(value) in tracked and any(map(_is_layer, tf.nest.flatten(value)))
        }
        traced = {f: getattr(model, f) for f in _TRACED}
        before.append((model, old, traced))
        new = {name: tf.nest.map_structure(exchange, value) for name, value in old.items()}
        _set_attributes(model, new, dict.fromkeys(traced))
        return model

    def put_back() -> None:
        for model, old, traced in before:
            _set_attributes(model, old, traced)

    try:
        with _scope(model):
            return exchange_all(model), put_back
    except Exception:
        put_back()
        raise


def _scope(model: Any) -> Any:
    """Where variables must be created: the model's strategy, unless one is in force."""
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def _is_layer(value: Any) -> bool:
    # Keras' metrics are layers, too.
    return isinstance(value, keras.layers.Layer) and not isinstance(value, keras.metrics.Metric)


# What was traced with some layers must not be used with others.
_TRACED = "train_function", "test_function", "predict_function"


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


def set_mask(model: Any, mask: Mask, optimizer: Any = None) -> None:
    """Puts a mask in force: sets it, and zeroes the pruned weights and their slots.

    Args:
      model: a pruned model.
      mask: kernel name -> array of the kernel's shape with values 0 and 1, for every
        kernel of the model.
      optimizer: whose slots to zero (default: the one the model is compiled with).
        They need not exist yet, unless they start at other values than 0 (Adagrad):
        then they are created.

    Raises:
      UserError: the model is not pruned, the names, shapes or values do not fit, or
        the optimizer's state does not survive masking.
    """
    found = _masked(model)
    fit(mask, {w.name: tuple(w.variable.shape) for w in found}, "mask")
    for name, m in mask.items():
        if not np.isin(m, (0, 1)).all():
            raise UserError(f"the mask of {name!r} holds values other than 0 and 1")
    optimizer = optimizer or getattr(model, "optimizer", None)
    if optimizer is not None:
        require_maskable(optimizer)
        if not _probe(optimizer).clean:
            create_slots(optimizer, model)
    slots = slots_of(optimizer, model) if optimizer is not None else {}
    for w in found:
        for variable in w.masks:
            variable.assign(np.asarray(mask[w.name], variable.dtype.as_numpy_dtype))
        for variable in (w.variable, *slots.get(w.name, ())):
            variable.assign(_select(w.masks[0], variable))
    _SET[model] = masks_set(model) + 1


_SET: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def masks_set(model: Any) -> int:
    """Returns how often `set_mask` has put a mask in force, for what depends on the mask."""
    return _SET.get(model, 0)


def fit(given: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raises UserError unless `given` has exactly these names and shapes."""
    if missing := [n for n in shapes if n not in given]:
        raise UserError(f"the {what} lacks {missing}; the model has {list(shapes)}")
    if extra := [n for n in given if n not in shapes]:
        raise UserError(f"the {what} has {extra}, which the model has not: it has {list(shapes)}")
    for name, shape in shapes.items():
        if tuple(np.shape(given[name])) != tuple(shape):
            raise UserError(
                f"the {what} of {name!r} has shape {tuple(np.shape(given[name]))}, "
                f"the model's is {tuple(shape)}"
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


def _masked(model: Any) -> list[_Weight]:
    found = [w for w in _weights(model) if w.masks]
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
        dtype = getattr(variable, "true_dtype", variable.dtype)
        variable.assign(masked[name].astype(dtype.as_numpy_dtype))


# --- Optimizers ------------------------------------------------------------------------


def inner_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer inside a LossScaleOptimizer, or the optimizer itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def slots_of(optimizer: Any, model: Any) -> dict[str, list[Any]]:
    """Returns kernel name -> the optimizer's variables of its shape (moments, averages)."""
    optimizer = inner_optimizer(optimizer)
    if isinstance(optimizer, keras.optimizers.legacy.Optimizer):
        return {name: _legacy_slots(optimizer, k) for name, k in kernels(model).items()}
    # Names need not be unique: an optimizer keeps lists with a slot for each variable, and
    # a dict of the variables' places in them, from `build` on.
    places = getattr(optimizer, "_index_dict", {})
    columns = [c for c in vars(optimizer).values() if isinstance(c, list) and len(c) == len(places)]
    slots: dict[str, list[Any]] = {}
    for name, kernel in kernels(model).items():
        place = places.get(optimizer._var_key(kernel))
        found = [] if place is None else [column[place] for column in columns]
        slots[name] = [s for s in found if isinstance(s, tf.Variable) and s.shape == kernel.shape]
    return slots


def _legacy_slots(optimizer: Any, kernel: Any) -> list[Any]:
    try:
        return [optimizer.get_slot(kernel, slot) for slot in optimizer.get_slot_names()]
    except KeyError:  # not trained, or not yet
        return []


def create_slots(optimizer: Any, model: Any) -> None:
    """Creates the optimizer's variables for a model, which `fit` does in its first step only."""
    build = getattr(optimizer, "build", None) or optimizer._create_all_weights  # a legacy one
    with _scope(model):
        build(model.trainable_variables)


def require_maskable(optimizer: Any) -> None:
    """Raises UserError if a masked weight does not stay 0.0 under this optimizer."""
    if not _probe(optimizer).survives:
        raise UserError(
            f"optimizer {type(inner_optimizer(optimizer)).__name__} does not keep a pruned weight "
            "at 0.0: its state does not survive masking; use adam, adamw, sgd, momentum or nesterov"
        )


class _Probe(NamedTuple):
    survives: bool  # a weight and its slots stay zero after they were zeroed
    clean: bool  # the slots of a weight that is zero and has gradient zero start at zero


_PROBED: dict[str, _Probe] = {}


def _probe(optimizer: Any) -> _Probe:
    """Tries an optimizer on a vector of three weights, rather than look it up in a list."""
    optimizer = inner_optimizer(optimizer)
    config = dict(optimizer.get_config())
    config |= {k: v for k, v in (("learning_rate", 0.1), ("jit_compile", False)) if k in config}
    key = f"{type(optimizer)} {json.dumps(config, sort_keys=True, default=str)}"
    if key not in _PROBED:
        # In a thread of its own there is no distribution strategy in force.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            _PROBED[key] = pool.submit(_try, type(optimizer).from_config, config).result()
    return _PROBED[key]


def _try(make: Callable[[dict], Any], config: dict[str, Any]) -> _Probe:
    layer = keras.layers.Dense(1, use_bias=False, dtype="float32")
    model = prune(keras.Sequential([keras.Input((3,)), layer]))
    name, kernel = next(iter(kernels(model).items()))

    def steps(optimizer: Any, gradient: float) -> None:
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant([[0.3], [gradient], [0.1]]), kernel)])

    def zeros(optimizer: Any) -> bool:
        values = [v.numpy() for v in (kernel, *slots_of(optimizer, model)[name])]
        return all(np.isfinite(v).all() and v[1, 0] == 0 for v in values)

    fresh, used = make(config), make(config)
    kernel.assign([[1.0], [0.0], [3.0]])
    steps(fresh, 0.0)
    clean = zeros(fresh)
    kernel.assign([[1.0], [-2.0], [3.0]])
    steps(used, -0.2)
    for variable in (kernel, *slots_of(used, model)[name]):
        variable.assign(tf.constant([[1.0], [0.0], [1.0]]) * variable)
    steps(used, 0.0)
    return _Probe(zeros(used), clean)


__all__ = [
    "InvariantError", "MaskedLayer", "assign", "check", "create_slots", "fit", "get_mask",
    "inner_optimizer", "is_pruned", "kernels", "kinds", "masks_set", "plain", "prune",
    "require_maskable",
    "require_model", "set_mask", "slots_of", "strip", "weights",
]  # fmt: skip
