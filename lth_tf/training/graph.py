"""The loop in TensorFlow: many steps in one graph, compiled where that helps."""

from __future__ import annotations

import dataclasses
from typing import Any

from lth_tf import distribute, pruning
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import layers_autographed
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
        # Without AutoGraph, which would take longer to read the loop than XLA to compile it.
        self.steps = tf.function(
            self._steps,
            jit_compile=loops,
            autograph=False,
            # A graph for each number of entries that replicas add up would be one for each level.
            reduce_retracing=self.strategy.num_replicas_in_sync > 1,
        )
        self.sums = tf.function(self._sums, jit_compile=loops, autograph=False)
        alone = compiled and not loops
        self._run, self._run_evaluation = (
            tf.function(step, jit_compile=True, autograph=False) if alone else step
            for step in (self._step, self._evaluation_step)
        )

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
        # As tensors: a graph would be traced for each number that is a Python one.
        numbers = tf.constant(end - step), tf.constant(seed % 2**64, tf.uint64), tf.constant(step)
        with self.feed.reading(), distribute.lost():
            source = self.feed.begin(step, end, seed)
            sums = self.steps(source, *numbers, tf.constant(total, tf.float64), self._packed)
        return float(sums[0]), int(sums[1])

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns the sums of losses and of hits on 'train', 'validation' or 'test'."""
        with self.feed.reading(), distribute.lost():
            loss, hits = self.sums(self.feed.part(part), part)
        return float(loss), float(hits)

    def sync(self) -> None:
        """Puts what training changed into the variables of model and optimizer: it is there."""

    # --- In the graph ---

    def _outputs(self, x: Any, training: bool) -> Any:
        """What the network puts out, wide enough for a loss."""
        with layers_autographed():
            outputs = self.model(x, training=training)
        return tf.cast(outputs, tf.float64 if outputs.dtype == tf.float64 else tf.float32)

    def _step(self, taken: Any, seed: Any, step: Any, packed: Any) -> Any:
        """One step on one replica; see the feed for `taken`, `Reduction` for `packed`."""
        x, y = self.feed.batch(taken, seed, step)
        variables = self.model.trainable_variables
        scaled = pruning.inner_optimizer(self.optimizer) is not self.optimizer
        with tf.GradientTape() as tape:
            losses = self.task.losses(y, self._outputs(x, training=True))
            # The mean over the global batch: replicas add up their shares of it.
            loss = tf.reduce_sum(losses) / self.spec.batch_size
            target = self.optimizer.get_scaled_loss(loss) if scaled else loss
        gradients = tape.gradient(target, variables)
        *gradients, loss = self.reduction(packed, [*gradients, loss])
        if scaled:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
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

    def _steps(
        self, source: Any, count: Any, seed: Any, step: Any, total: Any, packed: Any
    ) -> tuple[Any, Any]:
        """`count` steps; adds their losses to `total`; also the first not finite, or -1."""

        def body(i: Any, total: Any, bad: Any) -> tuple[Any, Any, Any]:
            taken = self.feed.take(source, i)
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

    def _evaluation_step(self, taken: Any, part: str) -> tuple[Any, Any]:
        x, y, inside = self.feed.examples(taken, part)
        inside, outputs = tf.cast(inside, tf.float64), self._outputs(x, training=False)
        return tuple(
            tf.reduce_sum(tf.cast(each, tf.float64) * inside)
            for each in (self.task.losses(y, outputs), self.task.hits(y, outputs))
        )


def compiles(spec: Spec, replicas: int, model: Any) -> bool:
    """Returns whether XLA helps here; on CPUs it makes convolutions slower, in a loop 100-fold.

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
    gpu = bool(tf.config.list_logical_devices("GPU"))
    return gpu or "conv" not in pruning.kinds(model).values()
