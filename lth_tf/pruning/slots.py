"""Optimizers: their state, and whether a masked weight stays zero under them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside


def inner_optimizer(optimizer: Any) -> Any:
    """Returns the optimizer inside a LossScaleOptimizer, or the optimizer itself.

    Raises:
      UserError: it is no optimizer of tf_keras.
    """
    known = keras.optimizers.Optimizer, keras.optimizers.legacy.Optimizer
    if not isinstance(optimizer, known):
        kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise UserError(
            f"{kind} is no optimizer of tf_keras; give an object such as keras.optimizers.Adam() "
            "with tf_keras as keras"
        )
    scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
    return optimizer.inner_optimizer if scaled else optimizer


def slots_for(optimizer: Any, kernel: Any) -> list[Any]:
    """Returns an optimizer's variables of a kernel's shape that belong to the kernel."""
    optimizer = inner_optimizer(optimizer)
    if isinstance(optimizer, keras.optimizers.legacy.Optimizer):
        return _legacy_slots(optimizer, kernel)
    return [
        slot
        for slot in inside.slots(optimizer, kernel)
        if isinstance(slot, tf.Variable) and slot.shape == kernel.shape
    ]


def _legacy_slots(optimizer: Any, kernel: Any) -> list[Any]:
    try:
        return [optimizer.get_slot(kernel, slot) for slot in optimizer.get_slot_names()]
    except KeyError:  # not trained, or not yet
        return []


def scope_of(model: Any) -> Any:
    """Returns the scope in which a model's variables are made: its own, unless one is in force."""
    if tf.distribute.has_strategy():
        return contextlib.nullcontext()
    return model.distribute_strategy.scope()


def create_slots(optimizer: Any, model: Any) -> None:
    """Creates the optimizer's variables for a model, which `fit` does in its first step only."""
    with scope_of(model):
        inside.build_optimizer(optimizer, model.trainable_variables)


def optimizer_state(optimizer: Any) -> list[Any]:
    """Returns an optimizer's variables: counter, slots, loss scale."""
    inner = inner_optimizer(optimizer)
    variables = inner.variables() if callable(inner.variables) else inner.variables
    # Of a LossScaleOptimizer `variables` are the inner one's.
    return [*variables, *inside.loss_scale(optimizer)]


def renew(optimizer: Any, model: Any) -> None:
    """Sets an optimizer's state to that of a new one of the same configuration.

    Zeros would be wrong for some: averages start at the weights, Adagrad at 0.1.
    """
    inner = inner_optimizer(optimizer)
    with inside.strategy_of(inner).scope():
        fresh = type(optimizer).from_config(optimizer.get_config())
    legacy = isinstance(inner, keras.optimizers.legacy.Optimizer)
    # It may have been built for a part of the model only.
    built = [] if legacy else inside.built_for(inner, model.variables)
    with scope_of(model):
        for each in (optimizer, fresh):
            inside.build_optimizer(each, built or model.trainable_variables)
    for old, new in zip(optimizer_state(optimizer), optimizer_state(fresh), strict=True):
        old.assign(new.read_value())


def is_built(optimizer: Any) -> bool:
    """Says whether an optimizer has slots, or needs none, for what it trains."""
    inner = inner_optimizer(optimizer)
    if isinstance(inner, keras.optimizers.legacy.Optimizer):
        return len(inner.variables()) > 1
    return bool(inside.is_built(inner))


def require_maskable(optimizer: Any) -> Probe:
    """Returns what an optimizer does to a weight that is pruned.

    Raises:
      UserError: such a weight does not stay 0.0 under it.
    """
    found = probe(optimizer)
    if not found.survives:
        raise UserError(
            f"optimizer {type(inner_optimizer(optimizer)).__name__} does not keep a pruned weight "
            "at 0.0: its state does not survive masking; use adam, adamw, sgd, momentum or nesterov"
        )
    return found


class Probe(NamedTuple):
    """What an optimizer does to a weight that is pruned.

    Attributes:
      survives: the weight and its slots stay zero after they were zeroed.
      clean: slots of a weight that is zero and has gradient zero start at zero.
    """

    survives: bool
    clean: bool


_PROBED: dict[str, Probe] = {}


def probe(optimizer: Any) -> Probe:
    """Returns what an optimizer does to a vector of three weights; no list of names could tell."""
    # In a thread of its own there is no distribution strategy in force, and no graph.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(_probed, inner_optimizer(optimizer)).result()


def _probed(optimizer: Any) -> Probe:
    config = dict(optimizer.get_config())
    config |= {k: v for k, v in (("learning_rate", 0.1), ("jit_compile", False)) if k in config}
    key = f"{type(optimizer)} {json.dumps(config, sort_keys=True, default=str)}"
    if key not in _PROBED:
        _PROBED[key] = _try(type(optimizer).from_config, config)
    return _PROBED[key]


def _try(make: Callable[[dict], Any], config: dict[str, Any]) -> Probe:
    layer = keras.layers.Dense(1, use_bias=False, dtype="float32")
    layer.build((None, 3))
    kernel = layer.kernel

    def steps(optimizer: Any, gradient: float) -> None:
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant([[0.3], [gradient], [0.1]]), kernel)])

    def zeros(optimizer: Any) -> bool:
        values = [v.numpy() for v in (kernel, *slots_for(optimizer, kernel))]
        return all(np.isfinite(v).all() and v[1, 0] == 0 for v in values)

    fresh, used = make(config), make(config)
    kernel.assign([[1.0], [0.0], [3.0]])
    steps(fresh, 0.0)
    clean = zeros(fresh)
    kernel.assign([[1.0], [-2.0], [3.0]])
    steps(used, -0.2)
    for variable in (kernel, *slots_for(used, kernel)):
        variable.assign(tf.constant([[1.0], [0.0], [1.0]]) * variable)
    steps(used, 0.0)
    return Probe(zeros(used), clean)
