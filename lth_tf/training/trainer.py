"""The training loop: many steps in one graph, callbacks at its boundaries."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf import distribute, models, pruning
from lth_tf.callbacks import Rewind
from lth_tf.compat import keras, tf
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.models import Weights, policy
from lth_tf.pruning.inside import rate_of
from lth_tf.pruning.slots import optimizer_state
from lth_tf.spec import Spec
from lth_tf.training import feeds
from lth_tf.training.feeds import CHUNK
from lth_tf.training.optimizers import OPTIMIZERS, learning_rate
from lth_tf.training.reduction import Reduction

_SECONDS = 5.0  # most that steps between two looks at whether to stop should take
_PACE = 32  # as many are done at first

class DivergedError(UserError):
    """The loss is NaN or infinite."""


class Interrupted(UserError):
    """A training was asked to stop before its end."""

    code = 143  # what a shell says of a process that SIGTERM has ended


@dataclasses.dataclass(frozen=True)
class State:
    """All that a training needs to go on at a step as if it had never stopped.

    Attributes:
      step: the next one.
      since: the step of the last evaluation.
      total: the sum of the losses of the steps since then, float64.
      rows: the evaluations so far; see `Trained`.
      seconds: how long it took.
      variables: name -> array: weights and optimizer; BatchNormalization's moving
        statistics of each replica.
    """

    step: int
    since: int
    total: float
    rows: tuple[dict[str, Any], ...]
    seconds: float
    variables: dict[str, np.ndarray]


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


class Trainer:
    """Trains tickets of one spec: the model and its graphs are built once, for all levels.

    Args:
      spec: what to train, and how.
      dataset: images and labels, in memory or streamed.
      strategy: the replicas to train on (default: what the spec asks for).

    Attributes:
      model: the pruned model.
      input_shape, classes: what it was built for.
      strategy, workers: the replicas, and the processes that they are in.
      feed: where batches come from.
      reduction: how gradients are added up.

    Raises:
      UserError: an unusable optimizer, devices or batch size, or too few examples.
    """

    def __init__(self, spec: Spec, dataset: Dataset | Streamed, strategy: Any = None):
        self.spec = spec
        self.dataset: Any = dataset
        self.input_shape = tuple(dataset.input_shape)
        self.classes = dataset.classes
        self.strategy = strategy or distribute.strategy_of(spec)
        self.workers = distribute.workers_of(self.strategy)
        replicas = self.strategy.num_replicas_in_sync
        self.feed = feeds.feed(dataset, spec, self.strategy)
        if spec.batch_size > self.feed.sizes["train"]:
            raise UserError(
                f"batch_size {spec.batch_size} exceeds the {self.feed.sizes['train']} training "
                f"examples that {dataset.name!r} has besides {spec.validation_size} for validation"
            )
        with policy(spec.precision), self.strategy.scope():
            plain = models.build(spec, self.input_shape, self.classes, spec.seed)
            self.model = pruning.prune(plain)
            self._rate = learning_rate(spec)
            self.model.compile(OPTIMIZERS[spec.optimizer](self._rate, spec))
            self.optimizer = self.model.optimizer
            self.optimizer.build(self.model.trainable_variables)
        pruning.require_maskable(self.optimizer)
        self.reduction = Reduction(self.model, self.strategy, spec.communication)
        self._averaged = [v for v in self.model.variables if distribute.is_own(v)]
        self._pace, self._kept = _PACE, None
        compiled = _compiles(spec, replicas, plain)
        loops = compiled and self.feed.loops
        # A graph for each number of entries that replicas add up would be one for each level.
        self._chunk = tf.function(self._steps, jit_compile=loops, reduce_retracing=replicas > 1)
        self._evaluation = tf.function(self._evaluate, jit_compile=loops)
        alone = compiled and not loops
        self._run, self._run_evaluation = (
            tf.function(step, jit_compile=True) if alone else step
            for step in (self._step, self._evaluate_step)
        )

    # --- In the graph ---

    def _losses(self, logits: Any, labels: Any) -> tuple[Any, Any]:
        logits = tf.cast(logits, tf.float64 if logits.dtype == tf.float64 else tf.float32)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits), logits

    def _step(self, taken: Any, seed: Any, step: Any, kept: Any) -> Any:
        """One step on one replica; `taken` is what the feed has for it, `kept` see `Reduction`."""
        x, y = self.feed.batch(taken, seed, step)
        variables = self.model.trainable_variables
        scaled = pruning.inner_optimizer(self.optimizer) is not self.optimizer
        with tf.GradientTape() as tape:
            losses, _ = self._losses(self.model(x, training=True), y)
            # The mean over the global batch: replicas add up their shares of it.
            loss = tf.reduce_sum(losses) / self.spec.batch_size
            target = self.optimizer.get_scaled_loss(loss) if scaled else loss
        gradients = tape.gradient(target, variables)
        *gradients, loss = self.reduction(kept, [*gradients, loss])
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

    def _steps(
        self, source: Any, count: Any, seed: Any, step: Any, total: Any, kept: Any
    ) -> tuple[Any, Any]:
        """`count` steps; adds their losses to `total`; also the first not finite, or -1."""
        bad = tf.constant(-1)
        for i in tf.range(count):
            taken = self.feed.take(source, i)
            losses = self.strategy.run(self._run, (taken, seed, step + i, kept))
            loss = tf.cast(self.strategy.experimental_local_results(losses)[0], tf.float64)
            bad = tf.where((bad < 0) & ~tf.math.is_finite(loss), i, bad)
            total += loss
        return total, bad

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
        with self.feed.reading(), distribute.lost():
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
        captured: Callable[[Weights], None] | None = None,
        callbacks: Sequence[Any] = (),
        state: State | None = None,
        keep: Callable[[State], None] | None = None,
        asked: Callable[[], bool] = lambda: False,
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
          captured: given those weights as soon as they are there.
          callbacks: Keras callbacks. `on_train_batch_end` fires after each block of
            steps with the last one's number, `on_epoch_*` around each evaluation;
            `stop_training` and a changed learning rate are honoured.
          state: where to go on, out of the same training that was interrupted; what
            callbacks remember is not part of it.
          keep: given the state every `checkpoint_every` steps, and when asked to stop.
          asked: whether to stop before the end; looked at every few seconds.

        Returns:
          What was trained.

        Raises:
          DivergedError: a loss is NaN or infinite; names the step.
          InvariantError: a pruned weight is not zero afterwards.
          Interrupted: `asked` said so.
        """
        spec = self.spec
        if state and capture is not None and state.step >= capture:
            capture = None
        rewind = Rewind(weights, mask, step=start, capture=capture)
        hooks = keras.callbacks.CallbackList([rewind, *callbacks], model=self.model)
        self.model.stop_training = False
        if isinstance(self._rate, float):  # a callback may have changed it
            pruning.inner_optimizer(self.optimizer).learning_rate = self._rate
        self._kept = self.reduction.kept(mask)
        hooks.on_train_begin()
        if captured and rewind.captured is not None:  # of the first step
            captured(rewind.captured)
        rows: list[dict[str, Any]] = []
        step, since, total, began = start, start, 0.0, time.perf_counter()
        if state:
            step, since, total, rows = state.step, state.since, state.total, list(state.rows)
            began -= state.seconds
            self._restore(state)
        else:
            self._row(rows, step, None, hooks, began, last=stop == start)
        stops = False

        def pause() -> None:
            """Keeps the state, where that is due, and stops, where that was asked."""
            due = spec.checkpoint_every and step % spec.checkpoint_every == 0
            if keep and step < stop and (due or stops):
                seconds = time.perf_counter() - began
                keep(State(step, since, total, tuple(rows), seconds, self._variables()))
            if stops and step < stop:
                kept = "is kept" if keep else "is lost"
                raise Interrupted(f"stopped at step {step} of {stop}, whose state {kept}")

        while step < stop and not self.model.stop_training:
            if step == since:
                hooks.on_epoch_begin(len(rows) - 1)
            end = min(
                (step // spec.eval_every + 1) * spec.eval_every,
                since + ((step - since) // CHUNK + 1) * CHUNK,
                stop,
            )
            if capture is not None and step < capture:
                end = min(end, capture)
            hooks.on_train_batch_begin(step)
            while True:  # in pieces of some seconds, within which nothing can stop it
                piece = min(end, step + self._pace)
                if spec.checkpoint_every:
                    every = spec.checkpoint_every
                    piece = min(piece, (step // every + 1) * every)
                total = self.advance(step, piece, seed, total)
                step, stops = piece, self._stops(asked)
                if step == end:
                    break
                pause()
            loss = total / (step - since)
            hooks.on_train_batch_end(step - 1, {"loss": loss, "step": step})
            if captured and rewind.captured is not None and step == capture:
                captured(rewind.captured)
            last = step == stop or bool(self.model.stop_training)
            if step % spec.eval_every == 0 or last:
                self._row(rows, step, loss, hooks, began, last)
                since, total = step, 0.0
            if not self.model.stop_training:
                pause()
        pruning.check(self.model, self.optimizer)
        hooks.on_train_end()
        values = {name: v.numpy() for name, v in pruning.weights(self.model).items()}
        return Trained(values, rows, rewind.captured)

    def advance(self, step: int, end: int, seed: int, total: float = 0.0) -> float:
        """Does the steps step .. end - 1, at most CHUNK, in one call; adds their losses to `total`.

        One after the other, so that the sum does not depend on how many calls there are.

        Raises:
          DivergedError: a loss is NaN or infinite; names the step.
        """
        # As tensors: a graph would be traced for each number that is a Python one.
        numbers = tf.constant(end - step), tf.constant(seed % 2**64, tf.uint64), tf.constant(step)
        began = time.perf_counter()
        with self.feed.reading(), distribute.lost():
            source = self.feed.begin(step, end, seed)
            sums = self._chunk(source, *numbers, tf.constant(total, tf.float64), self._kept)
        total, bad = float(sums[0]), int(sums[1])
        if bad >= 0:
            raise DivergedError(
                f"the training loss is not finite at step {step + bad}; lower "
                f"--learning_rate (now {self.spec.learning_rate:g}) or use --warmup_steps"
            )
        seconds = time.perf_counter() - began
        if seconds < _SECONDS / 5:
            self._pace = min(4 * self._pace, CHUNK)
        elif seconds > _SECONDS:
            self._pace = max(self._pace // 2, 1)
        return total

    def _stops(self, asked: Callable[[], bool]) -> bool:
        """Whether any worker is asked to stop; all get the chief's pace, too."""
        if self.workers.count == 1:
            return asked()
        mine = [float(asked()), self._pace if self.workers.chief else 0.0]
        stops, pace = self.workers.add([np.array(mine)])[0]
        self._pace = int(pace)
        return stops > 0

    def _variables(self) -> dict[str, np.ndarray]:
        """Returns all that training changes: what replicas share, then each replica's own."""
        shared: dict[str, np.ndarray] = {}
        own: dict[str, np.ndarray] = {}
        first = distribute.first_replica(self.strategy)
        for name, variable in self._changed():
            if distribute.is_own(variable):
                values = enumerate(variable.values, first)
                own |= {f"replica_{i}/{name}": value.numpy() for i, value in values}
            else:
                shared[name] = variable.numpy()
        for arrays, _ in self.workers.each((own, None)):
            shared |= arrays
        return shared

    def _restore(self, state: State) -> None:
        first = distribute.first_replica(self.strategy)
        for name, variable in self._changed():
            own = distribute.is_own(variable)
            for i, part in enumerate(variable.values if own else [variable], first):
                key = f"replica_{i}/{name}" if own else name
                if key not in state.variables:
                    raise UserError(
                        f"the checkpoint of step {state.step} lacks {key!r}: another version of "
                        "lth_tf wrote it; delete the level's checkpoint_* files to train it anew"
                    )
                part.assign(state.variables[key])

    def _changed(self) -> Iterator[tuple[str, Any]]:
        """Yields a name and the variable for each that training changes."""
        for name, variable in pruning.weights(self.model).items():
            yield f"weights/{name}", variable
        for i, variable in enumerate(optimizer_state(self.optimizer)):
            yield f"optimizer/{i:04d}", variable
        rate = rate_of(pruning.inner_optimizer(self.optimizer))  # a callback may change it
        if isinstance(rate, tf.Variable):
            yield "optimizer/learning_rate", rate

    def _row(
        self, rows: list, step: int, loss: float | None, hooks: Any, began: float, last: bool
    ) -> None:
        for variable in self._averaged:  # what is evaluated is what will be saved
            variable.assign(variable.read_value())
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
        rate = rate_of(optimizer)
        value = rate(optimizer.iterations) if callable(rate) else rate
        return float(keras.backend.get_value(value))


def _compiles(spec: Spec, replicas: int, model: Any) -> bool:
    """Whether XLA helps here; on CPUs it makes convolutions slower, in a loop 100-fold."""
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
