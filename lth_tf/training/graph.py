"""The loop in TensorFlow: many steps in one graph, compiled where that helps."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import numpy as np

from lth_tf import distribute, pruning
from lth_tf.compat import keras, tf
from lth_tf.dynamic import METHODS
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import layers_autographed, layers_within, stored_dtype
from lth_tf.spec import Spec
from lth_tf.tasks import Task
from lth_tf.training.optimizers import OPTIMIZERS
from lth_tf.training.reduction import Reduction


@dataclasses.dataclass(frozen=True)
class Setup:
    """What trains: a network with its optimizer, the data, the replicas.

    Attributes:
      spec: batch size, precision, weight decay and the like.
      task: what the network is trained for.
      model: it, pruned and compiled.
      optimizer: that trains it.
      feed: where batches come from.
      strategy: the replicas.
      reduction: how gradients are added up.
    """

    spec: Spec
    task: Task
    model: Any
    optimizer: Any
    feed: Any
    strategy: Any
    reduction: Reduction


class Graph:
    """An engine that trains the whole network in TensorFlow.

    An engine does the steps of a training and evaluates in between. Every one has these methods;
    what it changed in memory of its own, if it has any, it puts back in `sync`.

    Args:
      setup: what trains.

    Attributes:
      apart: whether it has memory of its own.
      blocks: whether it has the method `course`, too.

    Raises:
      UserError: XLA is asked for where it does not work.
    """

    apart = False

    def __init__(self, setup: Setup):
        self.spec, self.task, self.model = setup.spec, setup.task, setup.model
        self.optimizer, self.feed, self.strategy = setup.optimizer, setup.feed, setup.strategy
        self.reduction = setup.reduction
        self._packed: Any = None
        compiled = compiles(self.spec, self.strategy.num_replicas_in_sync, self.model)
        loops = compiled and self.feed.loops
        # With a scaled loss steps may be left out, and the learning rate is that of another one.
        scaled = pruning.inner_optimizer(self.optimizer) is not self.optimizer
        self.blocks = loops and not scaled
        # Without AutoGraph, which would take longer to read the loop than XLA to compile it. One
        # executable does everything where evaluations are part of it.
        self.steps = tf.function(
            self._blocks if self.blocks else self._steps,
            jit_compile=loops,
            autograph=False,
            # A graph for each number of entries that replicas add up would be one for each level.
            reduce_retracing=self.strategy.num_replicas_in_sync > 1,
        )
        self.average = self._averages()
        self._dense = tf.function(self._dense_steps, jit_compile=loops, autograph=False)
        self.sums = tf.function(self._sums, jit_compile=loops, autograph=False)
        alone = compiled and not loops
        self._run, self._run_evaluation = (
            tf.function(step, jit_compile=True, autograph=False) if alone else step
            for step in (self._step, self._evaluation_step)
        )

    def _averages(self) -> list[Any] | None:
        """Of each kernel the moving average of its gradient, where the spec's method wants that."""
        if not by_momentum(self.spec):
            return None
        with self.strategy.scope():
            return [
                tf.Variable(
                    tf.zeros(v.shape, stored_dtype(v)), trainable=False,
                    aggregation=tf.VariableAggregation.MEAN,
                )
                for v in pruning.kernels(self.model).values()
            ]

    # --- On the host ---

    def begin(self, mask: Mask) -> None:
        """Takes over from the variables of model and optimizer.

        Called before the first step, and again after a state was restored, a mask was set, or
        somebody else may have changed variables.

        Args:
          mask: kernel name -> 0/1 array, the one in force.
        """
        self._packed = self.reduction.entries(mask)

    def advance(self, step: int, end: int, seed: int, total: float) -> tuple[float, int]:
        """Does the steps step .. end - 1, at most `feeds.CHUNK`.

        Args:
          step, end: the first step, and the one after the last.
          seed: of the order of examples.
          total: a sum of losses.

        Returns:
          `total` and the losses of the steps, added up one after the other, so that the sum does
          not depend on how many calls there are; and which of them is the first that is not
          finite, counted from `step`, or -1.
        """
        if self.blocks:
            _, total, bad = self._called(step, end, seed, total)
            return total, bad
        with self.feed.reading(), distribute.lost():
            source = self.feed.begin(step, end, seed)
            sums = self.steps(source, *_numbers(step, end, seed, total), self._packed)
        return float(sums[0]), int(sums[1])

    def _called(
        self, step: int, end: int, seed: int, total: float, best: float | None = None
    ) -> tuple[Any, float, int]:
        """What `_blocks` returns, without evaluations where there is no `best`."""
        parts = self.feed.part("validation"), self.feed.part("test")
        evaluates = tf.constant(best is not None), tf.constant(best or 0.0, tf.float64)
        source = self.feed.begin(step, end, seed)
        numbers = _numbers(step, end, seed, total)
        rows, total, bad = self.steps(source, *numbers, self._packed, parts, *evaluates)
        return rows, float(total), int(bad)

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns the sums of losses and of hits on 'train', 'validation' or 'test'."""
        if self.blocks and part != "train":  # an executable less
            (_, *sums, _), *_ = self._called(0, 0, 0, 0.0, math.inf)[0].numpy().tolist()
            return tuple(sums[:2] if part == "validation" else sums[2:])
        with self.feed.reading(), distribute.lost():
            loss, hits = self.sums(self.feed.part(part), part)
        return float(loss), float(hits)

    def course(
        self, step: int, end: int, seed: int, best: float
    ) -> tuple[list[list[float]], int]:
        """Does the steps step .. end - 1 with the evaluations that are due in one call.

        Args:
          step, end: multiples of `eval_every`, at most `feed.most` apart.
          seed: of the order of examples.
          best: the lowest mean validation loss so far.

        Returns:
          For each evaluation the sum of the losses of the steps before it; the sums of losses and
          of hits on the validation part, and on the test part, NaN where its validation loss is
          not the lowest so far. And the first step whose loss is not finite, counted from `step`,
          or -1. A loss that is not finite ends it.
        """
        rows, _, bad = self._called(step, end, seed, 0.0, best)
        rows = rows.numpy().tolist()
        return [row for row in rows[: (end - step) // self.spec.eval_every] if row[5]], bad

    def sync(self) -> None:
        """Puts what training changed into the variables of model and optimizer: it is there."""

    def dense_gradients(
        self, step: int, seed: int, held_out: bool
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a step's batch, and kernel name -> gradient, pruned weights included.

        Moving statistics change as in a step.

        Args:
          step: which.
          seed: of the order of examples.
          held_out: whether it is a batch of the validation part instead.
        """
        with self.feed.reading(), distribute.lost():
            begin = self.feed.held_out if held_out else self.feed.begin
            source = begin(step, step + 1, seed)
            _, *numbers, _ = _numbers(step, step + 1, seed, 0.0)
            loss, *gradients = self._dense(source, *numbers)
        names = pruning.kernels(self.model)
        return float(loss), {n: g.numpy() for n, g in zip(names, gradients, strict=True)}

    # --- In the graph ---

    def _dense_steps(self, source: Any, seed: Any, step: Any) -> list[Any]:
        """The loss of a source's first step, and the gradient of each kernel, over all replicas."""
        taken = self.feed.take(source, tf.constant(0))
        found = self.strategy.run(self._dense_step, (taken, seed, step))
        return [self.strategy.reduce(tf.distribute.ReduceOp.SUM, each, None) for each in found]

    def _dense_step(self, taken: Any, seed: Any, step: Any) -> list[Any]:
        x, y = self.feed.batch(taken, seed, step)
        kernels = list(pruning.kernels(self.model).values())
        with tf.GradientTape() as tape, pruning.dense_gradients():
            losses = self._losses(y, self._outputs(x, training=True))
            loss = tf.reduce_sum(losses) / self.spec.batch_size
        return [tf.cast(loss, tf.float64), *tape.gradient(loss, kernels)]

    def _outputs(self, x: Any, training: bool) -> Any:
        """What the network puts out, wide enough for a loss."""
        with layers_autographed():
            outputs = self.model(x, training=training)
        return tf.cast(outputs, tf.float64 if outputs.dtype == tf.float64 else tf.float32)

    def _losses(self, y: Any, outputs: Any) -> Any:
        """The losses that are trained: (1 - a) loss + a times the mean of it over all classes."""
        losses, smooth = self.task.losses(y, outputs), self.spec.label_smoothing
        if smooth:
            spread = -tf.reduce_mean(tf.nn.log_softmax(outputs), -1)
            losses = (1 - smooth) * losses + smooth * spread
        return losses

    def _step(self, taken: Any, seed: Any, step: Any, packed: Any) -> Any:
        """One step on one replica; see the feed for `taken`, `Reduction` for `packed`."""
        x, y = self.feed.batch(taken, seed, step)
        variables = self.model.trainable_variables
        scaled = pruning.inner_optimizer(self.optimizer) is not self.optimizer
        dense = pruning.dense_gradients if self.average else contextlib.nullcontext
        with tf.GradientTape() as tape, dense():
            losses = self._losses(y, self._outputs(x, training=True))
            # The mean over the global batch: replicas add up their shares of it.
            loss = tf.reduce_sum(losses) / self.spec.batch_size
            target = self.optimizer.get_scaled_loss(loss) if scaled else loss
        gradients = tape.gradient(target, variables)
        *gradients, loss = self.reduction(packed, [*gradients, loss])
        if scaled:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        if self.average:
            gradients = self._averaged(gradients)
        if self.spec.weight_decay and not OPTIMIZERS.about(self.spec.optimizer).decoupled:
            decay = self.spec.weight_decay
            gradients = [
                g + decay * tf.cast(v, g.dtype)
                for g, v in zip(gradients, variables, strict=True)
            ]
        self.optimizer.apply_gradients(
            zip(gradients, variables, strict=True), skip_gradients_aggregation=True
        )
        return loss

    def _averaged(self, gradients: list[Any]) -> list[Any]:
        """Takes dense gradients into the averages; returns those of kept weights."""
        pairs = zip(pruning.mask_variables(self.model), self.average or [], strict=True)
        of = {id(kernel): (mask, average) for (kernel, mask), average in pairs}
        kept = []
        for g, v in zip(gradients, self.model.trainable_variables, strict=True):
            if id(v) in of:
                mask, average = of[id(v)]
                average.assign(0.9 * average + (1 - 0.9) * tf.cast(g, average.dtype))
                g = tf.where(mask != 0, g, tf.zeros([], g.dtype))
            kept.append(g)
        return kept

    def _steps(
        self, source: Any, count: Any, seed: Any, step: Any, total: Any, packed: Any, first: Any = 0
    ) -> tuple[Any, Any]:
        """`count` steps; adds their losses to `total`; also the first not finite, or -1.

        `first` is the position of `step` in `source`.
        """

        def body(i: Any, total: Any, bad: Any) -> tuple[Any, Any, Any]:
            taken = self.feed.take(source, first + i)
            losses = self.strategy.run(self._run, (taken, seed, step + i, packed))
            loss = tf.cast(self.strategy.experimental_local_results(losses)[0], tf.float64)
            bad = tf.where((bad < 0) & ~tf.math.is_finite(loss), i, bad)
            return i + 1, total + loss, bad

        # Compared with a tensor: XLA compiles a loop over tf.range for each length anew.
        going = tf.constant(0), total, tf.constant(-1)
        _, total, bad = tf.while_loop(
            lambda i, *_: i < count, body, going, parallel_iterations=1
        )
        return total, bad

    def _sums(self, source: Any, part: str) -> tuple[Any, Any]:
        """The sums of losses and of hits over a part."""

        def body(i: Any, loss: Any, hits: Any) -> tuple[Any, Any, Any]:
            taken = self.feed.block(source, i)
            results = self.strategy.run(self._run_evaluation, (taken, part))
            sums = [self.strategy.reduce(tf.distribute.ReduceOp.SUM, r, None) for r in results]
            return i + 1, loss + sums[0], hits + sums[1]

        zero, blocks = tf.constant(0.0, tf.float64), self.feed.blocks(part)
        _, loss, hits = tf.while_loop(
            lambda i, *_: i < blocks, body, (tf.constant(0), zero, zero), parallel_iterations=1
        )
        return loss, hits

    def _blocks(
        self, source: Any, count: Any, seed: Any, step: Any, total: Any, packed: Any, parts: Any,
        evaluates: Any, best: Any,
    ) -> tuple[Any, Any, Any]:  # fmt: skip
        """`count` steps, or one evaluation; if it `evaluates`, with a row for each that is due.

        Returns float64 [most, 6], see `course`, the last column 1 where a row is written; the sum
        of losses since the last row; and the first that is not finite, or -1.
        """
        every, sizes = self.spec.eval_every, self.feed.sizes
        zero, nan = tf.constant(0.0, tf.float64), tf.constant(float("nan"), tf.float64)

        def row(total: Any, best: Any) -> tuple[Any, Any]:
            loss, hits = self._sums(parts[0], "validation")
            mean = loss / sizes["validation"]
            test = tf.cond(mean < best, lambda: self._sums(parts[1], "test"), lambda: (nan, nan))
            return tf.stack([total, loss, hits, *test, zero + 1]), tf.minimum(best, mean)

        def body(i: Any, at: Any, best: Any, total: Any, bad: Any, rows: Any) -> tuple[Any, ...]:
            left = every - (step + i) % every
            many = tf.minimum(left, count - i)
            total, now = self._steps(source, many, seed, step + i, total, packed, i)
            bad = tf.where((bad < 0) & (now >= 0), i + now, bad)
            due = (evaluates & (many == left)) | (count == 0)
            found, best = tf.cond(
                due, lambda: row(total, best), lambda: (tf.zeros(6, tf.float64), best)
            )
            # What was not due is written over by the next.
            rows = tf.tensor_scatter_nd_update(rows, [[at]], [found])
            bad = tf.where((bad < 0) & due & ~tf.math.is_finite(found[1]), count, bad)
            at, total = at + tf.cast(due, tf.int32), tf.where(due, zero, total)
            return i + many, at, best, total, bad, rows

        going = (
            tf.constant(0), tf.constant(0), best, total, tf.constant(-1),
            tf.zeros([self.feed.most // every + 1, 6], tf.float64),
        )  # fmt: skip
        _, _, _, total, bad, rows = tf.while_loop(
            lambda i, at, best, total, bad, rows: (i < tf.maximum(count, 1 - at)) & (bad < 0),
            body, going, parallel_iterations=1,
        )  # fmt: skip
        return rows, total, bad

    def _evaluation_step(self, taken: Any, part: str) -> tuple[Any, Any]:
        x, y, inside = self.feed.examples(taken, part)
        inside, outputs = tf.cast(inside, tf.float64), self._outputs(x, training=False)
        return tuple(
            tf.reduce_sum(tf.cast(each, tf.float64) * inside)
            for each in (self.task.losses(y, outputs), self.task.hits(y, outputs))
        )


def by_momentum(spec: Spec) -> bool:
    """Says whether a method wants the gradient of pruned weights at every step."""
    return spec.recipe == "sparse" and METHODS[spec.method].grow == "momentum"


def _numbers(step: int, end: int, seed: int, total: float) -> tuple[Any, ...]:
    """As tensors: a graph would be traced for each number that is a Python one."""
    steps = tf.constant(end - step), tf.constant(seed % 2**64, tf.uint64), tf.constant(step)
    return *steps, tf.constant(total, tf.float64)


def compiles(spec: Spec, replicas: int, model: Any) -> bool:
    """Returns whether XLA helps here.

    On CPUs it makes convolutions slower, in a loop 100-fold, and recurrent layers 5-fold.

    Args:
      spec: whose `compile` says what is wanted.
      replicas: how many share a batch.
      model: a pruned model.

    Raises:
      UserError: it is asked for where several replicas share a batch.
    """
    if replicas > 1:  # steps that replicas add gradients up in are not for XLA
        if spec.compile == "on":
            raise UserError(
                f"compile=on does not work where {replicas} replicas share a batch; use auto"
            )
        return False
    if spec.compile != "auto":
        return spec.compile == "on"
    if tf.config.list_logical_devices("GPU"):
        return True
    recurrent = any(isinstance(x, keras.layers.RNN) for x in layers_within(model))
    return "conv" not in pruning.kinds(model).values() and not recurrent
