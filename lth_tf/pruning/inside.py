"""What this package asks of tf_keras that tf_keras does not promise: one function each.

Nothing else in lth_tf, `compat` aside, uses a name that begins with an underscore or is not
documented. Where such a name is gone the function fails, it has no default; and
`tests/test_inside.py` tries each on the smallest real object, so that another version of
tf_keras fails there first and says what it no longer means.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import types
from collections.abc import Iterable
from typing import Any

from lth_tf.compat import (
    AddLoss,
    AddMetric,
    AutoCastVariable,
    Functional,
    RevivedLayer,
    from_saved_model,
    is_keras_3,
    is_subclassed,
    keras,
    tf,
)
from lth_tf.errors import UserError

# --- Layers and models -----------------------------------------------------------------


def layers_within(layer: Any) -> list[Any]:
    """Returns a layer and all layers in it, at any depth, each before those in it.

    Raises:
      UserError: it is no layer or model of tf_keras.
    """
    require_layer(layer)
    return list(layer._flatten_layers())


def require_layer(given: Any) -> None:
    """Raises UserError unless something is a layer or model of tf_keras."""
    if is_keras_3(given):
        raise UserError(
            f"{type(given).__name__} {getattr(given, 'name', '')!r} is a Keras 3 model; lth_tf "
            "prunes tf_keras models: build it with `import tf_keras as keras` (or import lth_tf "
            "before tensorflow.keras is touched), then copy the weights with set_weights"
        )
    if not isinstance(given, keras.layers.Layer):
        raise UserError(f"lth_tf takes a tf_keras model, not {type(given).__name__}")


def sublayers(layer: Any) -> list[Any]:
    """Returns the layers that a layer holds itself."""
    return list(layer._flatten_layers(recursive=False, include_self=False))


def own_weights(layer: Any) -> list[Any]:
    """Returns the variables that a layer itself made, those that are trained first."""
    return [*layer._trainable_weights, *layer._non_trainable_weights]


def is_graph_network(layer: Any) -> bool:
    """Says whether a layer is a model that Keras knows as a graph of layers."""
    return isinstance(layer, keras.Model) and layer._is_graph_network


def is_chain(model: Any) -> bool:
    """Says whether each layer of a model takes in what the one before puts out, and no more."""
    if not is_graph_network(model):
        return False
    configs = model.get_config()["layers"]
    if isinstance(model, keras.Sequential):
        return True
    fed = [[[name for name, *_ in node] for node in each["inbound_nodes"]] for each in configs]
    names = [each["name"] for each in configs]
    return fed == [[], *([[name]] for name in names[:-1])]


def calls_of(model: Any) -> list[tuple[Any, list[Any], tuple[int | None, ...]]]:
    """Returns a layer, the layers whose outputs it takes, and its output's shape, for each call.

    Of a model that Keras knows as a graph, each call after those it takes from. Where a layer puts
    out several tensors the shape is the first one's.
    """
    by_depth = model._nodes_by_depth
    nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    found = []
    for node in nodes:
        shape = tuple(tf.nest.flatten(node.outputs)[0].shape)
        found.append((node.layer, list(tf.nest.flatten(node.inbound_layers)), shape))
    return found


def is_tracked(model: Any, value: Any) -> bool:
    """Says whether an attribute's value is a layer, or a list or dict, that Keras tracks."""
    return any(value is tracked for tracked in model._self_tracked_trackables)


def traced_functions(model: Any) -> dict[str, Any]:
    """Returns attribute -> what `fit`, `evaluate` and `predict` have traced, or None."""
    names = "train_function", "test_function", "predict_function"
    return {name: getattr(model, name) for name in names}


def steps_in_a_call(model: Any) -> int:
    """Returns how many steps `fit` does in one call of what it has traced; before `compile` 1."""
    many = model._steps_per_execution
    return 1 if many is None else int(keras.backend.get_value(many))


def replace_train_function(model: Any, function: Any) -> Any:
    """Has `fit` call a function of its iterator for each step; returns what it called before.

    Within `fit` only, from `on_train_begin` on: it makes its own first.
    """
    before = model.train_function
    model.train_function = function
    return before


def holds_symbolic_loss(layer: Any) -> bool:
    """Says whether `add_loss` or `add_metric` on a symbolic tensor made a layer."""
    return isinstance(layer, (AddLoss, AddMetric))


def automatic_name(layer: Any) -> str:
    """Returns what Keras calls a layer that nobody names, without the number that follows."""
    kind = "Model" if type(layer) is Functional else type(layer).__name__
    snake = re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()
    return f"private{snake}" if snake.startswith("_") else snake


def was_named(layer: Any) -> bool:
    """Says whether whoever made a layer named it, as far as Keras remembers.

    It remembers arguments of simple types. A configuration, as of a file or a copy, has names
    that Keras made up, too; it is known by telling also what nobody tells. Models in files have
    their names only, so of models it does not say.
    """
    if isinstance(layer, keras.Model):
        return False
    if vars(layer).get("_named"):
        return True
    if not layer._auto_get_config:
        return False
    given = layer._auto_config.config
    return given.get("name") is not None and not {"trainable", "dtype"} <= given.keys()


def is_revived(layer: Any) -> bool:
    """Says whether a layer was read from a SavedModel as traced functions, without its class."""
    return isinstance(layer, RevivedLayer)


def was_resumed(model: Any) -> bool:
    """Says whether BackupAndRestore has put a state in force, at the beginning of `fit`."""
    state = vars(model).get("_training_state")  # gone after a training, else None
    if state is None:
        return False
    unused = state.CKPT_SAVED_EPOCH_UNUSED_VALUE
    return any(int(v) != unused for v in (state._ckpt_saved_epoch, state._ckpt_saved_batch))


def set_untracked(owner: Any, attribute: str, value: Any) -> None:
    """Sets an attribute past Keras' __setattr__: what is tracked and saved stays as it is.

    Args:
      owner: a layer.
      attribute: its name.
      value: anything; of a tensor in a variable's stead the layer does not see the difference.
    """
    owner.__dict__[attribute] = value


def treat_alike(wrapper: Any, layer: Any) -> None:
    """Has Keras treat a wrapper as the layer in it: arguments of its call, casts, input shape."""
    wrapper._call_spec = layer._call_spec
    wrapper._autocast = layer._autocast
    # Only layers that were told the shape of their inputs have it.
    if not hasattr(wrapper, "_batch_input_shape") and hasattr(layer, "_batch_input_shape"):
        wrapper._batch_input_shape = layer._batch_input_shape


# --- AutoGraph -------------------------------------------------------------------------


def autographed(function: Any) -> Any:
    """Returns a function that AutoGraph reads, as in a tf.function, unless it is of this package.

    For functions of people's own inside graphs that are made without AutoGraph, which takes
    longer to read a loop than XLA to compile it.
    """
    if getattr(function, "__module__", "").startswith("lth_tf."):
        return function
    context = tf.__internal__.autograph.control_status_ctx()
    enabled = type(context)(type(context.status).ENABLED)
    return tf.__internal__.autograph.tf_convert(function, enabled)


def layers_autographed() -> Any:
    """Returns a context in which Keras gives people's layers to AutoGraph, as in `fit`."""
    context = tf.__internal__.autograph.control_status_ctx()
    return type(context)(type(context.status).ENABLED)


def unread(call: Any) -> Any:
    """Marks a layer's `call` that AutoGraph need not read, unlike what it calls; returns it."""
    call.autograph_info__ = {}
    return call


def call_of(layer: Any) -> Any:
    """Returns a layer's `call`, given to AutoGraph where Keras would do that."""
    if not is_subclassed(layer) or from_saved_model(layer):
        return layer.call
    autograph = tf.__internal__.autograph
    return autograph.tf_convert(layer.call, autograph.control_status_ctx())


# --- Losses of layers ------------------------------------------------------------------


def add_activity_loss(layer: Any, outputs: Any) -> None:
    """Adds the loss of a layer's activity regularizer, as its __call__ would."""
    if layer._activity_regularizer:
        layer._handle_activity_regularization(None, outputs)


def weight_losses(layer: Any) -> list[Any]:
    """Returns the list itself in which a layer has its losses of weights: () -> loss."""
    return layer._callable_losses


def set_weight_losses(layer: Any, losses: Iterable[Any]) -> None:
    """Gives a layer other losses of weights."""
    layer._callable_losses = list(losses)


def regularization(loss: Any) -> functools.partial | None:
    """Returns partial(variable -> loss, variable) of a regularizer's loss in `weight_losses`."""
    inner = loss.args[0]  # Keras wraps every loss: partial(tag, loss)
    return inner if isinstance(inner, functools.partial) and inner.args else None


def regularizer_of(loss: functools.partial) -> Any:
    """Returns the regularizer of a `regularization`; None where it is a loss of someone's own."""
    return inspect.getclosurevars(loss.func).nonlocals.get("regularizer")


def mark_weight_loss(loss: Any) -> None:
    """Marks a tensor as Keras marks losses that no inputs enter."""
    loss._unconditional_loss = True


# --- Variables -------------------------------------------------------------------------


def casts_itself(variable: Any) -> bool:
    """Says whether a variable is read in the dtype of the layer that is being called."""
    return isinstance(variable, AutoCastVariable)


def stored_dtype(variable: Any) -> Any:
    """Returns the dtype in which a variable is stored, whatever it is read in."""
    return variable.true_dtype if casts_itself(variable) else variable.dtype


def parts(variable: Any) -> list[Any]:
    """Returns the variables of the replicas that a variable is made of, or itself."""
    inner = variable._variable if casts_itself(variable) else variable
    return list(inner.values) if isinstance(inner, tf.distribute.DistributedValues) else [inner]


def constrain(variable: Any, constraint: Any) -> None:
    """Has optimizers apply a function, or none, to a variable after each update.

    Args:
      variable: of one replica or of several.
      constraint: variable -> its new value, or None.
    """
    for part in parts(variable):
        part._constraint = constraint


# --- Optimizers ------------------------------------------------------------------------


def slots(optimizer: Any, variable: Any) -> list[Any]:
    """Returns an optimizer's entry for a variable in each of its lists; [] before `build`.

    Names of slots need not be unique. But an optimizer (not a legacy one) has lists of one
    entry for each variable, and from `build` on the variables' indices in them.
    """
    unbuilt: Any = types.SimpleNamespace()
    keras.optimizers.Optimizer._build_index_dict(unbuilt, [])  # fails where there is no such dict
    indices = getattr(optimizer, "_index_dict", unbuilt._index_dict)
    lists = [v for v in vars(optimizer).values() if isinstance(v, list) and len(v) == len(indices)]
    index = indices.get(optimizer._var_key(variable))
    return [] if index is None else [entries[index] for entries in lists]


def is_optimizer(value: Any) -> bool:
    """Says whether a value is an optimizer, of whatever kind."""
    return isinstance(value, (keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer))


def optimizer_at_work() -> Any:
    """Returns the optimizer that is just applying a variable's constraint, or None.

    A constraint is told the variable only; who applies it is found among the callers.
    """
    frame = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            break
        if is_optimizer(optimizer := frame.f_locals.get("self")):
            return optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return None


def built_for(optimizer: Any, variables: Iterable[Any]) -> list[Any]:
    """Returns those variables that an optimizer (not a legacy one) was built for, in its order."""
    indices = getattr(optimizer, "_index_dict", {})
    found = {indices[key]: v for v in variables if (key := optimizer._var_key(v)) in indices}
    return [found[i] for i in sorted(found)]


def is_built(optimizer: Any) -> bool:
    """Says whether an optimizer (not a legacy one) knows which variables it trains."""
    return hasattr(optimizer, "_index_dict")


def build_optimizer(optimizer: Any, variables: list[Any]) -> None:
    """Makes an optimizer's slots for variables."""
    if isinstance(optimizer, keras.optimizers.legacy.Optimizer):
        optimizer._create_all_weights(variables)
    else:
        optimizer.build(variables)


def strategy_of(optimizer: Any) -> Any:
    """Returns the strategy in whose scope an optimizer (no LossScaleOptimizer) was made."""
    # A legacy one that was made in a replica has none.
    return optimizer._distribution_strategy or tf.distribute.get_strategy()


def rate_of(optimizer: Any) -> Any:
    """Returns an optimizer's learning rate as it is set: a variable, or a schedule itself."""
    return optimizer._learning_rate


def loss_scale(optimizer: Any) -> list[Any]:
    """Returns the variables of a LossScaleOptimizer that adapts its scale: scale and counter."""
    if not isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer) or not optimizer.dynamic:
        return []
    return [optimizer._loss_scale.current_loss_scale, optimizer.dynamic_counter]


def untimed(hooks: Any) -> Any:
    """Returns a CallbackList that does not compare what callbacks take with what batches take.

    It would warn of slow callbacks where a batch, as it is told of, is done already.
    """
    hooks._check_timing = False
    return hooks
