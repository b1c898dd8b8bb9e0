"""The training loop: many steps in one graph, callbacks at its boundaries."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf import feeds, models, pruning, schedules
from lth_tf.callbacks import Rewind
from lth_tf.compat import keras, tf
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.feeds import CHUNK
from lth_tf.masks import Mask
from lth_tf.registry import Registry
from lth_tf.spec import Spec

Weights = dict[str, np.ndarray]
OPTIMIZERS: Registry[Callable[[Any, Spec], Any]] = Registry("optimizer")


@OPTIMIZERS.register("adam")
def adam(rate: Any, spec: Spec) -> Any:
    """Adam (Kingma and Ba 2015), beta 0.9 and 0.999, epsilon 1e-7."""
    return keras.optimizers.Adam(rate, jit_compile=False)


@OPTIMIZERS.register("adamw")
def adamw(rate: Any, spec: Spec) -> Any:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return keras.optimizers.AdamW(rate, weight_decay=spec.weight_decay, jit_compile=False)


@OPTIMIZERS.register("sgd")
def sgd(rate: Any, spec: Spec) -> Any:
    """Stochastic gradient descent."""
    return keras.optimizers.SGD(rate, jit_compile=False)


@OPTIMIZERS.register("momentum")
def momentum(rate: Any, spec: Spec) -> Any:
    """SGD with heavy-ball momentum."""
    return keras.optimizers.SGD(rate, momentum=spec.momentum, jit_compile=False)


@OPTIMIZERS.register("nesterov")
def nesterov(rate: Any, spec: Spec) -> Any:
    """SGD with Nesterov's momentum."""
    return keras.optimizers.SGD(rate, momentum=spec.momentum, nesterov=True, jit_compile=False)


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


class DivergedError(UserError):
    """The loss is NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
      weights: path -> array, at the end.
      rows: a dict per evaluation: step, loss (mean over the steps since the last
        evaluation), validation and test loss and accuracy (None where the test part
        was not looked at), learning_rate, seconds since the beginning.
      captured: the weights at the step asked for, or None.
    """

    weights: Weights
    rows: list[dict[str, Any]]
    captured: Weights | None = None


@contextlib.contextmanager
def policy(precision: str) -> Iterator[None]:
    """Within, Keras builds layers under this mixed-precision policy."""
    before = keras.mixed_precision.global_policy()
    keras.mixed_precision.set_global_policy(precision)
    try:
        yield
    finally:
        keras.mixed_precision.set_global_policy(before)


def strategy_of(spec: Spec) -> Any:
    """Returns the tf.distribute strategy that a spec asks for.

    Raises:
      UserError: more devices than there are, or a batch that they do not divide.
    """
    if spec.distribute == "none":
        return tf.distribute.get_strategy()
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = [d.name for d in tf.config.list_logical_devices(kind)]
    if (spec.devices or 1) > len(found):
        raise UserError(f"devices {spec.devices} are asked for, but there are only {found}")
    used = found[: spec.devices]
    if spec.batch_size % len(used):
        raise UserError(
            f"batch_size {spec.batch_size} cannot be divided among {len(used)} devices; give a "
            f"multiple of {len(used)}"
        )
    # On CPUs the collective ops of two strategies in one process get in each other's way.
    reduction = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
    return tf.distribute.MirroredStrategy(used, cross_device_ops=reduction)


def plain_model(spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int) -> Any:
    """Returns the spec's network without masks, in float64 or else float32."""
    with policy("float64" if spec.precision == "float64" else "float32"):
        return models.build(spec, input_shape, classes, seed)


def initial_weights(
    spec: Spec, input_shape: tuple[int, ...], classes: int, seed: int
) -> tuple[Weights, list[str]]:
    """Returns the weights that the model starts from under `seed`, and its kernels' names."""
    model = plain_model(spec, input_shape, classes, seed)
    values = {name: v.numpy() for name, v in pruning.weights(model).items()}
    return values, list(pruning.kernels(model))


class Trainer:
    """Trains tickets of one spec: the model and its graphs are built once, for all levels.

    Args:
      spec: what to train, and how.
      dataset: images and labels, in memory or streamed.

    Attributes:
      model: the pruned model.
      input_shape, classes: what it was built for.

    Raises:
      UserError: an unusable optimizer, devices or batch size, or too few examples.
    """

    def __init__(self, spec: Spec, dataset: Dataset | Streamed):
        self.spec = spec
        self.dataset: Any = dataset
        self.input_shape = tuple(dataset.input_shape)
        self.classes = dataset.classes
        self.strategy = strategy_of(spec)
        self.feed = feeds.feed(dataset, spec, self.strategy)
        if spec.batch_size > self.feed.sizes["train"]:
            raise UserError(
                f"batch_size {spec.batch_size} exceeds the {self.feed.sizes['train']} training "
                f"examples that {dataset.name!r} has besides {spec.validation_size} for validation"
            )
        with policy(spec.precision), self.strategy.scope():
            plain = models.build(spec, self.input_shape, self.classes, spec.seed)
            self.model = pruning.prune(plain)
            self._rate = _rate(spec)
            self.model.compile(OPTIMIZERS[spec.optimizer](self._rate, spec))
            self.optimizer = self.model.optimizer
            self.optimizer.build(self.model.trainable_variables)
        pruning.require_maskable(self.optimizer)
        compiled = _compiles(spec, self.strategy, plain)
        loops = compiled and self.feed.loops
        self._chunk = tf.function(self._steps, jit_compile=loops)
        self._evaluation = tf.function(self._evaluate, jit_compile=loops)
        # On several replicas a step sums up gradients, which a graph of its own cannot.
        alone = compiled and not loops and self.strategy.num_replicas_in_sync == 1
        self._run, self._run_evaluation = (
            tf.function(step, jit_compile=True) if alone else step
            for step in (self._step, self._evaluate_step)
        )

    # --- In the graph ---

    def _losses(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        logits = tf.cast(logits, tf.float64 if logits.dtype == tf.float64 else tf.float32)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), logits

    def _step(self, taken: Any, seed: Any, step: Any) -> Any:
        """One step on one replica; `taken` is what the feed has for it."""
        replica = tf.distribute.get_replica_context()
        x, y = self.feed.batch(taken, seed, step)
        variables = self.model.trainable_variables
        scaled = pruning.inner_optimizer(self.optimizer) is not self.optimizer
        with tf.GradientTape() as tape:
            losses, _ = self._losses(self.model(x, training=True), y)
            # The mean over the global batch: replicas add up their shares of it.
            loss = tf.reduce_sum(losses) / self.spec.batch_size
            target = self.optimizer.get_scaled_loss(loss) if scaled else loss
        gradients = tape.gradient(target, variables)
        if self.strategy.num_replicas_in_sync > 1:
            gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, gradients)
            loss = replica.all_reduce(tf.distribute.ReduceOp.SUM, loss)
        if scaled:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        if self.spec.weight_decay and self.spec.optimizer != "adamw":
            decay = self.spec.weight_decay
            gradients = [
                g + decay * tf.cast(v, g.dtype)
                for g, v in zip(gradients, variables, strict=True)
            ]
        self.optimizer.apply_gradients(
            zip(gradients, variables, strict=True), skip_gradients_aggregation=True
        )
        return loss

    def _steps(self, source: Any, count: Any, seed: Any, step: Any) -> tuple[Any, Any]:
        """`count` steps; returns their mean loss and the first with a loss not finite, or -1."""
        total, bad = tf.constant(0.0, tf.float64), tf.constant(-1)
        for i in tf.range(count):
            taken = self.feed.take(source, i)
            losses = self.strategy.run(self._run, (taken, seed, step + i))
            loss = tf.cast(self.strategy.experimental_local_results(losses)[0], tf.float64)
            bad = tf.where((bad < 0) & ~tf.math.is_finite(loss), i, bad)
            total += loss
        return total / tf.cast(count, tf.float64), bad

    def _evaluate(self, source: Any, part: str) -> tuple[Any, Any]:
        """Returns the sum of losses and the number of correct predictions over a part."""
        loss, correct = tf.constant(0.0, tf.float64), tf.constant(0.0, tf.float64)
        for i in tf.range(self.feed.blocks(part)):
            taken = self.feed.block(source, i)
            results = self.strategy.run(self._run_evaluation, (taken, part))
            sums = [self.strategy.reduce(tf.distribute.ReduceOp.SUM, r, None) for r in results]
            loss, correct = loss + sums[0], correct + sums[1]
        return loss, correct

    def _evaluate_step(self, taken: Any, part: str) -> tuple[Any, Any]:
        x, y, inside = self.feed.examples(taken, part)
        inside = tf.cast(inside, tf.float64)
        losses, logits = self._losses(self.model(x, training=False), y)
        hits = tf.argmax(logits, -1, tf.int32) == y
        return (
            tf.reduce_sum(tf.cast(losses, tf.float64) * inside),
            tf.reduce_sum(tf.cast(hits, tf.float64) * inside),
        )

    # --- On the host ---

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns mean loss and accuracy (0 to 1) on 'train', 'validation' or 'test'."""
        with self.feed.reading():
            loss, correct = self._evaluation(self.feed.part(part), part)
        return float(loss) / self.feed.sizes[part], float(correct) / self.feed.sizes[part]

    def train(
        self,
        weights: Weights,
        mask: Mask,
        start: int,
        stop: int,
        *,
        seed: int = 0,
        capture: int | None = None,
        callbacks: Sequence[Any] = (),
    ) -> Trained:
        """Trains mask x weights from step `start` to step `stop`.

        Every `eval_every` steps, at the beginning and at the end the model is evaluated
        on the validation part, and on the test part where the validation loss is the
        lowest so far and at the end: those are the steps that can be reported.

        Args:
          weights: path -> array, all weights of the model.
          mask: kernel name -> 0/1 array.
          start, stop: the first step of the schedule and the one after the last.
          seed: of the order of examples.
          capture: a step whose weights to return as well.
          callbacks: Keras callbacks. `on_train_batch_end` fires after each block of
            steps with the last one's number, `on_epoch_*` around each evaluation;
            `stop_training` and a changed learning rate are honoured.

        Returns:
          What was trained.

        Raises:
          DivergedError: a loss is NaN or infinite; names the step.
          InvariantError: a pruned weight is not zero afterwards.
        """
        spec, began = self.spec, time.perf_counter()
        rewind = Rewind(weights, mask, step=start, capture=capture)
        hooks = keras.callbacks.CallbackList([rewind, *callbacks], model=self.model)
        self.model.stop_training = False
        if isinstance(self._rate, float):  # a callback may have changed it
            pruning.inner_optimizer(self.optimizer).learning_rate = self._rate
        hooks.on_train_begin()
        rows: list[dict[str, Any]] = []
        step, since, total = start, start, 0.0
        self._row(rows, step, None, hooks, began, last=stop == start)
        while step < stop and not self.model.stop_training:
            if step == since:
                hooks.on_epoch_begin(len(rows) - 1)
            evaluation = (step // spec.eval_every + 1) * spec.eval_every
            end = min(step + CHUNK, evaluation, stop)
            if capture is not None and step < capture:
                end = min(end, capture)
            hooks.on_train_batch_begin(step)
            loss = self.advance(step, end, seed)
            total += loss * (end - step)
            step = end
            hooks.on_train_batch_end(step - 1, {"loss": loss, "step": step})
            last = step == stop or bool(self.model.stop_training)
            if step % spec.eval_every == 0 or last:
                self._row(rows, step, total / (step - since), hooks, began, last)
                since, total = step, 0.0
        pruning.check(self.model, self.optimizer)
        hooks.on_train_end()
        values = {name: v.numpy() for name, v in pruning.weights(self.model).items()}
        return Trained(values, rows, rewind.captured)

    def advance(self, step: int, end: int, seed: int) -> float:
        """Does the steps step .. end - 1, at most CHUNK, in one call; returns their mean loss.

        Raises:
          DivergedError: a loss is NaN or infinite; names the step.
        """
        # As tensors: a graph would be traced for each number that is a Python one.
        numbers = tf.constant(end - step), tf.constant(seed % 2**64, tf.uint64), tf.constant(step)
        with self.feed.reading():
            loss, bad = self._chunk(self.feed.begin(step, end, seed), *numbers)
        if int(bad) >= 0:
            raise DivergedError(
                f"the training loss is not finite at step {step + int(bad)}; lower "
                f"--learning_rate (now {self.spec.learning_rate:g}) or use --warmup_steps"
            )
        return float(loss)

    def _row(
        self, rows: list, step: int, loss: float | None, hooks: Any, began: float, last: bool
    ) -> None:
        validation_loss, validation_accuracy = self.evaluate("validation")
        if not math.isfinite(validation_loss):
            raise DivergedError(
                f"the validation loss is not finite at step {step}; lower --learning_rate (now "
                f"{self.spec.learning_rate:g}) or use --warmup_steps"
            )
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "validation_loss": validation_loss,
            "validation_accuracy": validation_accuracy,
            "test_loss": None,
            "test_accuracy": None,
            "learning_rate": self._current_rate(),
        }
        if last or all(validation_loss < r["validation_loss"] for r in rows):
            row["test_loss"], row["test_accuracy"] = self.evaluate("test")
        row["seconds"] = time.perf_counter() - began
        rows.append(row)
        if loss is not None:
            hooks.on_epoch_end(len(rows) - 2, dict(row))

    def _current_rate(self) -> float:
        optimizer = pruning.inner_optimizer(self.optimizer)
        rate = optimizer._learning_rate  # the property would hide the schedule
        value = rate(optimizer.iterations) if callable(rate) else rate
        return float(keras.backend.get_value(value))


def _rate(spec: Spec) -> Any:
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


def _compiles(spec: Spec, strategy: Any, model: Any) -> bool:
    """Whether XLA helps here; on CPUs it makes convolutions slower, in a loop 100-fold."""
    gpu = bool(tf.config.list_logical_devices("GPU"))
    mirrored_cpus = strategy.num_replicas_in_sync > 1 and not gpu
    if spec.compile == "on" and mirrored_cpus:
        raise UserError("compile=on does not work with --distribute=mirrored on CPUs; use auto")
    if spec.compile != "auto":
        return spec.compile == "on"
    return not mirrored_cpus and (gpu or "conv" not in pruning.kinds(model).values())
