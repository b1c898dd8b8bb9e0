"""Networks by name: MODELS[name](input_shape, classes, seed) -> a built, plain Keras model.

Models end in logits. Their weights are a function of (seed, init) alone: each layer
draws from a seed of its own, so that equal seeds give equal weights in every process.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.registry import Registry
from lth_tf.spec import Spec

Builder = Callable[..., Any]
Init = Callable[[int], Any]

INITS: Registry[Init] = Registry("initialisation")


@INITS.register("glorot_normal")
def glorot_normal(seed: int) -> Any:
    """Variance 2 / (fan_in + fan_out), truncated at two standard deviations (corrected).

    Glorot and Bengio 2010. Truncated as in Frankle's code; the ticket paper says
    "Gaussian Glorot".
    """
    return keras.initializers.GlorotNormal(seed=seed)


@INITS.register("glorot_normal_untruncated")
def glorot_normal_untruncated(seed: int) -> Any:
    """Variance 2 / (fan_in + fan_out), a plain normal distribution."""
    return keras.initializers.VarianceScaling(1.0, "fan_avg", "untruncated_normal", seed=seed)


@INITS.register("glorot_uniform")
def glorot_uniform(seed: int) -> Any:
    """Variance 2 / (fan_in + fan_out), uniform: Keras' default."""
    return keras.initializers.GlorotUniform(seed=seed)


@INITS.register("kaiming_normal")
def kaiming_normal(seed: int) -> Any:
    """Variance 2 / fan_in, a plain normal distribution (He et al. 2015; open_lth's default)."""
    return keras.initializers.VarianceScaling(2.0, "fan_in", "untruncated_normal", seed=seed)


def _inits(init: str, seed: int) -> Iterator[Any]:
    """One initialiser after another, each with its own seed derived from `seed`."""
    make = INITS[init]
    stream = np.random.default_rng([seed, 0x1A1E])
    while True:
        yield make(int(stream.integers(2**31 - 1)))


@keras.saving.register_keras_serializable(package="lth_tf")
class StatelessDropout(keras.layers.Layer):
    """Dropout whose noise is a function of (seed, number of training calls so far).

    The count is a weight like any other, so saving, rewinding and resuming restore the
    noise too, which Keras' Dropout cannot do.

    Args:
      rate: fraction of inputs set to 0, below 1; the rest is scaled by 1 / (1 - rate).
      seed: any integer.
    """

    def __init__(self, rate: float, seed: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed

    def build(self, input_shape: Any) -> None:
        """Creates the count, int64 []."""
        self.count = self.add_weight(
            "count",
            [],
            dtype=tf.int64,
            initializer="zeros",
            trainable=False,
            aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
        )
        super().build(input_shape)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """Drops in training, passes inputs through otherwise."""
        if training is None:
            training = keras.backend.learning_phase()
        if not isinstance(training, bool) and not isinstance(training, int):
            return tf.cond(training, lambda: self._drop(inputs), lambda: tf.identity(inputs))
        return self._drop(inputs) if training else inputs

    def _drop(self, inputs: Any) -> Any:
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context else 0
        key = tf.stack([tf.cast(self.seed * 1009 + replica, tf.int64), self.count.read_value()])
        noise = tf.random.stateless_uniform(tf.shape(inputs), key)
        with tf.control_dependencies([noise]):
            self.count.assign_add(1)
        scale = tf.cast(1 / (1 - self.rate), inputs.dtype)
        return tf.where(noise >= self.rate, inputs * scale, tf.zeros([], inputs.dtype))

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


def build(spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int) -> Any:
    """Returns the network that a spec describes, with weights drawn from `seed`.

    Raises:
      UserError: the spec changes an option (width, shortcut) that the network lacks.
    """
    builder = MODELS[spec.model]
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"init": spec.init}
    for name in ("width", "shortcut"):
        if name in known:
            options[name] = getattr(spec, name)
        elif getattr(spec, name) != getattr(Spec, name):
            raise UserError(
                f"model {spec.model!r} has no {name} to choose; leave it at {getattr(Spec, name)!r}"
            )
    return builder(input_shape, classes, seed, **options)


def _lenet(units: list[int]) -> Builder:
    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        inits = _inits(init, seed)
        layers = [keras.Input(input_shape), keras.layers.Flatten(name="flatten")]
        for i, n in enumerate(units):
            layers.append(
                keras.layers.Dense(
                    n, activation="relu", kernel_initializer=next(inits), name=f"fc{i + 1}"
                )
            )
        layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
        return keras.Sequential(layers, name="lenet")

    build.__doc__ = f"Fully connected ReLU network, hidden units {units} (LeCun et al. 1998)."
    return build


def _family(name: str) -> Builder | None:
    """Any 'lenet_A_B_...': hidden layers of A, B, ... units."""
    if re.fullmatch(r"lenet(_[1-9]\d*)+", name):
        return _lenet([int(n) for n in name.split("_")[1:]])
    return None


MODELS: Registry[Builder] = Registry("model", _family, ("lenet_A_B_...",))
MODELS.register("lenet_300_100")(_lenet([300, 100]))


@MODELS.register("lenet5")
def lenet5(
    input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
) -> Any:
    """Two 5x5 convolutions of 20 and 50 filters with max-pools, a dense layer of 500.

    "LeNet-5-Caffe" of the pruning papers (Lee et al. 2019, section 5.1): 431,080
    parameters on 28x28 images, 430,500 of them weights of kernels.
    """
    inits = _inits(init, seed)
    layers: list[Any] = [keras.Input(input_shape)]
    for i, filters in enumerate((20, 50)):
        layers += [
            keras.layers.Conv2D(
                filters,
                5,
                activation="relu",
                kernel_initializer=next(inits),
                name=f"conv{i + 1}",
            ),
            keras.layers.MaxPooling2D(name=f"pool{i + 1}"),
        ]
    layers += [
        keras.layers.Flatten(name="flatten"),
        keras.layers.Dense(500, activation="relu", kernel_initializer=next(inits), name="fc1"),
        keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"),
    ]
    return keras.Sequential(layers, name="lenet5")


def _conv(blocks: list[int], dropout: float) -> Builder:
    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        inits = _inits(init, seed)
        layers: list[Any] = [keras.Input(input_shape)]
        n = 0
        for filters in blocks:
            for _ in range(2):
                n += 1
                layers.append(
                    keras.layers.Conv2D(
                        filters,
                        3,
                        padding="same",
                        activation="relu",
                        kernel_initializer=next(inits),
                        name=f"conv{n}",
                    )
                )
            layers.append(keras.layers.MaxPooling2D(name=f"pool{n // 2}"))
            if dropout:
                layers.append(StatelessDropout(dropout, seed * 16 + n, name=f"drop_pool{n // 2}"))
        layers.append(keras.layers.Flatten(name="flatten"))
        for i in (1, 2):
            layers.append(
                keras.layers.Dense(
                    256, activation="relu", kernel_initializer=next(inits), name=f"fc{i}"
                )
            )
            if dropout:
                layers.append(StatelessDropout(dropout, seed * 16 + 8 + i, name=f"drop_fc{i}"))
        layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
        return keras.Sequential(layers, name=f"conv{2 * len(blocks)}")

    build.__doc__ = (
        f"VGG-like network: two 3x3 convolutions and a max-pool for each of {blocks} filters, two "
        f"dense layers of 256, dropout {dropout:g} (Frankle and Carbin 2019, figure 2)."
    )
    return build


for _depth, _blocks in ((2, [64]), (4, [64, 128]), (6, [64, 128, 256])):
    MODELS.register(f"conv{_depth}")(_conv(_blocks, 0.0))
    MODELS.register(f"conv{_depth}_dropout")(_conv(_blocks, 0.5))
