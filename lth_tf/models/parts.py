"""What the networks are made of: initialisations, dropout that repeats, sizes that are checked."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning.inside import unread
from lth_tf.registry import Registry

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


@INITS.register("kaiming_normal_fan_out")
def kaiming_normal_fan_out(seed: int) -> Any:
    """Variance 2 / fan_out, a plain normal distribution (He et al. 2015; GraSP's published code).

    That code draws its output layer with a deviation of 0.01: `output_std`.
    """
    return keras.initializers.VarianceScaling(2.0, "fan_out", "untruncated_normal", seed=seed)


def draw_output(model: Any, deviation: float, seed: int) -> None:
    """Draws the kernel of a model's output layer from a normal distribution around 0.

    Args:
      model: a plain model.
      deviation: the standard deviation.
      seed: equal seeds draw equal weights.
    """
    name = next(name for name, kind in pruning.kinds(model).items() if kind == "output")
    kernel = pruning.kernels(model)[name]
    drawn = np.random.default_rng([seed, 0x0075]).normal(0, deviation, kernel.shape)
    kernel.assign(drawn.astype(kernel.dtype.as_numpy_dtype))


def initialisers(init: str, seed: int) -> Iterator[Any]:
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
      width, kept: how many channels a network has of which the inputs are a part, and which
        channels these are: they get the noise that they would get there.
    """

    def __init__(
        self, rate: float, seed: int, width: int = 0, kept: Sequence[int] = (), **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        self.width, self.kept = width, [int(i) for i in kept]

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

    @unread
    def call(self, inputs: Any, training: Any = None) -> Any:
        """Drops in training, passes inputs through otherwise."""
        if training is None:
            training = keras.backend.learning_phase()
        if not isinstance(training, bool) and not isinstance(training, int):
            return tf.cond(training, lambda: self._drop(inputs), lambda: tf.identity(inputs))
        return self._drop(inputs) if training else inputs

    def _drop(self, inputs: Any) -> Any:
        context = tf.distribute.get_replica_context()
        replica, replicas = (
            (context.replica_id_in_sync_group, context.num_replicas_in_sync) if context else (0, 1)
        )
        key = tf.stack([tf.constant(self.seed * 1009, tf.int64), self.count.read_value()])
        # Drawn for the whole batch, so that any number of replicas drops the same.
        shape = tf.shape(inputs)
        first, n = replica * shape[0], shape[0]
        size = [[replicas * n], shape[1:-1], [self.width or shape[-1]]]
        noise = tf.random.stateless_uniform(tf.concat(size, 0), key)[first : first + n]
        if self.width:
            noise = tf.gather(noise, tf.constant(self.kept, tf.int32), axis=-1)
        with tf.control_dependencies([noise]):
            self.count.assign_add(1)
        scale = tf.cast(1 / (1 - self.rate), inputs.dtype)
        return tf.where(noise >= self.rate, inputs * scale, tf.zeros([], inputs.dtype))

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        part = {"width": self.width, "kept": self.kept} if self.width else {}
        return {**super().get_config(), "rate": self.rate, "seed": self.seed, **part}

    def narrowed(self, keep: np.ndarray) -> dict[str, Any]:
        """Returns the configuration for a part of the channels; see `compaction`.

        Args:
          keep: bool [channels].
        """
        return {**self.get_config(), "width": len(keep), "kept": np.flatnonzero(keep).tolist()}


def require_images(model: str, input_shape: tuple[int, ...], smallest: int = 1) -> None:
    """Raises UserError unless the inputs are images with sides of at least `smallest` pixels.

    Args:
      model: its name, for the message.
      input_shape: of one input, without the batch.
      smallest: the shortest side that it can take.
    """
    if len(input_shape) != 3 or min(input_shape[:2]) < smallest:
        raise UserError(
            f"model {model!r} needs images [height, width, channels] of at least "
            f"{smallest}x{smallest} pixels, not {list(input_shape)}"
        )


def scaled(channels: int, width: float) -> int:
    """Returns width x channels as a whole number, at least 1; raises UserError as `countable`."""
    return countable(max(1, round(width * channels)))


def countable(units: int) -> int:
    """Returns the number of units of a layer; raises UserError where TensorFlow cannot count it."""
    if units >= 2**31:
        raise UserError(f"a layer of {units} units is too large; it must have fewer than 2^31")
    return units


_SYNCHRONIZED: contextvars.ContextVar[bool] = contextvars.ContextVar("synchronized", default=False)


@contextlib.contextmanager
def synchronized(on: bool) -> Iterator[None]:
    """Within, `norm` takes its statistics over all replicas' shares of a batch, or over each's."""
    token = _SYNCHRONIZED.set(on)
    try:
        yield
    finally:
        _SYNCHRONIZED.reset(token)


def norm(name: str) -> Any:
    """Returns batch normalisation, momentum 0.9 and epsilon 1e-5: PyTorch's and the papers'."""
    return keras.layers.BatchNormalization(
        momentum=0.9, epsilon=1e-5, name=name, synchronized=_SYNCHRONIZED.get()
    )
