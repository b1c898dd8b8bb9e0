"""Optimizers by name, and the learning rate that they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lth_tf import schedules
from lth_tf.compat import keras, tf
from lth_tf.registry import Registry
from lth_tf.spec import Spec

# What others need to know: whether weight_decay is its own, apart from the gradient.
OPTIMIZERS: Registry[Callable[[Any, Spec], Any]] = Registry("optimizer", decoupled=False)


@OPTIMIZERS.register("adam")
def adam(rate: Any, spec: Spec) -> Any:
    """Adam (Kingma and Ba 2015), beta 0.9 and 0.999."""
    return exact(keras.optimizers.Adam(rate, epsilon=spec.adam_epsilon, jit_compile=False), spec)


@OPTIMIZERS.register("adamw", decoupled=True)
def adamw(rate: Any, spec: Spec) -> Any:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    made = keras.optimizers.AdamW(
        rate, weight_decay=spec.weight_decay, epsilon=spec.adam_epsilon, jit_compile=False
    )
    return exact(made, spec)


@OPTIMIZERS.register("sgd")
def sgd(rate: Any, spec: Spec) -> Any:
    """Stochastic gradient descent."""
    return exact(keras.optimizers.SGD(rate, jit_compile=False), spec)


@OPTIMIZERS.register("momentum")
def momentum(rate: Any, spec: Spec) -> Any:
    """SGD with heavy-ball momentum."""
    return exact(keras.optimizers.SGD(rate, momentum=spec.momentum, jit_compile=False), spec)


@OPTIMIZERS.register("nesterov")
def nesterov(rate: Any, spec: Spec) -> Any:
    """SGD with Nesterov's momentum."""
    made = keras.optimizers.SGD(rate, momentum=spec.momentum, nesterov=True, jit_compile=False)
    return exact(made, spec)


def exact(optimizer: Any, spec: Spec) -> Any:
    """Returns an optimizer whose constants are not rounded to float32 on the way to float64.

    `tf.cast(0.9, tf.float64)` is the float32 nearest to 0.9; of a numpy number it is 0.9.

    Args:
      optimizer: of Keras.
      spec: whose precision.
    """
    if spec.precision == "float64":
        for name, value in vars(optimizer).items():
            if type(value) is float:
                setattr(optimizer, name, np.float64(value))
    return optimizer


@keras.saving.register_keras_serializable(package="lth_tf")
class Table(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate looked up by step, the last one for ever after.

    Args:
      values: the rate of each step, float[steps].
    """

    def __init__(self, values: Any):
        self.values = np.asarray(values, np.float64)

    def __call__(self, step: Any) -> Any:
        """Returns the rate of a step, float64 []."""
        index = tf.minimum(tf.cast(step, tf.int32), len(self.values) - 1)
        return tf.gather(tf.constant(self.values), index)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {"values": self.values.tolist()}


def learning_rate(spec: Spec) -> Any:
    """A float where the rate is constant, so that callbacks may change it; else a table."""
    if spec.lr_schedule == "constant" and not spec.warmup_steps:
        return spec.learning_rate
    return Table(
        schedules.learning_rates(
            spec.lr_schedule,
            spec.learning_rate,
            spec.train_steps,
            drops=spec.lr_drops,
            factor=spec.lr_drop_factor,
            warmup=spec.warmup_steps,
        )
    )
