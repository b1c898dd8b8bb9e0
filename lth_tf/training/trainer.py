"""The training loop: many steps in one graph, callbacks at its boundaries."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lth_tf import datasets, distribute, models, pruning, schedules
from lth_tf.callbacks import Rewind
from lth_tf.callbacks.moving import Mover, flow, gradients_at
from lth_tf.compat import keras
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.masks import Mask
from lth_tf.models import Weights, policy
from lth_tf.pruning.inside import rate_of, untimed
from lth_tf.spec import Spec, require_spec
from lth_tf.tasks import TASKS
from lth_tf.training import feeds, states
from lth_tf.training.engines import Engines
from lth_tf.training.feeds import CHUNK
from lth_tf.training.graph import Setup, by_momentum
from lth_tf.training.optimizers import OPTIMIZERS, learning_rate
from lth_tf.training.reduction import Reduction
from lth_tf.training.states import DivergedError, Interrupted, State, Trained

_SECONDS = 5.0  # most that steps between two looks at whether to stop should take
_PACE = 32  # as many are done at first

@dataclasses.dataclass
class _Course:
    """A call of `train`: where it is, where it goes, and whom it tells."""

    state: State  # with a list of rows
    stop: int
    seed: int
    hooks: Any
    mover: Mover | None
    looked_at: bool  # whether somebody looks at variables at boundaries, or changes them
    boundaries: Callable[[int], Iterable[int | None]]  # step -> later ones that others need
    keep: Callable[[State], None] | None
    asked: Callable[[], bool]
    began: float

    @property
    def settled(self) -> int:
        """The step from which on the density is what it will be."""
        return self.mover.settled if self.mover else 0

    def seconds(self) -> float:
        return time.perf_counter() - self.began


class Trainer:
    """Trains tickets of one spec: the model and its graphs are built once, for all levels.

    Args:
      spec: what to train, and how.
      dataset: inputs and labels, in memory or streamed.
      strategy: the replicas to train on (default: what the spec asks for).
      blueprint: of the network, where others look at it, too.
      execution: what computes it.

    Attributes:
      model: the pruned model.
      input_shape, classes: what it was built for.
      task: what it is trained for.
      strategy, workers: the replicas, and the processes that they are in.
      feed: where batches come from.
      reduction: how gradients are added up.
      setup: all of this together, for engines.
      engine: what computes the training at hand; see `graph.Graph`.

    Raises:
      UserError: an unusable optimizer, devices or batch size, or too few examples.
    """

    def __init__(
        self,
        spec: Spec,
        dataset: Dataset | Streamed,
        strategy: Any = None,
        blueprint: models.Blueprint | None = None,
        execution: Execution = Execution(),  # noqa: B008
    ):
        require_spec(spec)
        datasets.require(dataset)
        self.spec = spec
        self.dataset: Any = dataset
        self.input_shape = tuple(dataset.input_shape)
        self.classes = dataset.classes
        self.task = TASKS[dataset.task]
        if spec.label_smoothing and dataset.task != "classification":
            raise UserError(f"label_smoothing has no meaning for the task {dataset.task!r}")
        self.strategy = strategy or distribute.strategy_of(spec)
        self.workers = distribute.workers_of(self.strategy)
        self.feed = feeds.feed(dataset, spec, self.strategy)
        if spec.batch_size > self.feed.sizes["train"]:
            raise UserError(
                f"batch_size {spec.batch_size} exceeds the {self.feed.sizes['train']} training "
                f"examples that {dataset.name!r} has besides {spec.validation_size} for validation"
            )
        blueprint = blueprint or models.Blueprint(spec, self.input_shape, self.classes)
        with self.strategy.scope(), policy(spec.precision):
            self.model = blueprint.pruned()
            self._rate = learning_rate(spec)
            self.model.compile(OPTIMIZERS[spec.optimizer](self._rate, spec))
            self.optimizer = self.model.optimizer
            self.optimizer.build(self.model.trainable_variables)
        models.require_fit(spec, self.model, dataset)
        pruning.require_maskable(self.optimizer)
        dense = by_momentum(spec)  # gradients of pruned weights are added up, too
        if dense and spec.communication == "packed":
            raise UserError(
                f"communication=packed adds up gradients of kept weights alone, and {spec.method} "
                "needs all of them at every step; use auto or plain"
            )
        communication = "plain" if dense else spec.communication
        self.reduction = Reduction(self.model, self.strategy, communication)
        self._measures = "gradient_flow" in spec.measure
        self._averaged = [v for v in self.model.variables if distribute.is_own(v)]
        self._pace, self._mask_number = _PACE, -1
        self.setup = Setup(
            spec, self.task, self.model, self.optimizer, self.feed, self.strategy, self.reduction
        )
        self.engines = Engines(self.setup, execution)
        self.engine = self.engines.of(Decision())

    def evaluate(self, part: str) -> tuple[float, float]:
        """Returns mean loss and the task's metric on 'train', 'validation' or 'test'."""
        loss, hits = self.engine.evaluate(part)
        return loss / self.feed.sizes[part], hits / self.feed.sizes[part]

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
        mover: Mover | None = None,
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
            `stop_training`, a changed learning rate and a changed mask
            (`pruning.set_mask(self.model, mask)`) are honoured. One with a method
            `next_boundary(step)` is asked for a later step at which a block is to end. One whose
            `looks` is False neither looks at variables nor sets them, nor stops the training:
            where all are such, several evaluations are done before they are told of them.
          mover: moves the mask at steps of its own.
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
        if state and capture is not None and state.step >= capture:
            capture = None
        rewind = Rewind(weights, mask, step=start, capture=capture, captured=captured)
        hooks = untimed(keras.callbacks.CallbackList([rewind, *callbacks], model=self.model))
        asking = [each.next_boundary for each in callbacks if hasattr(each, "next_boundary")]
        self.model.stop_training = False
        if isinstance(self._rate, float):  # a callback may have changed it
            pruning.inner_optimizer(self.optimizer).learning_rate = self._rate
        hooks.on_train_begin()
        began = time.perf_counter()
        self.engines.look()
        decision = (
            Decision.of(state.decision) if state else self.engines.choose(mask, stop - start)
        )
        if mover:
            mover.begin(self.model, self.optimizer, mask, self.engines.of(Decision()))
        course = _Course(
            State(start, start, 0.0, [], 0.0, decision=decision.told()), stop, seed, hooks, mover,
            self._measures or any(getattr(each, "looks", True) for each in callbacks),
            lambda step: [capture, *(ask(step) for ask in asking)], keep, asked, began,
        )  # fmt: skip
        if state:
            rows = [self._in_columns(row) for row in state.rows]
            course.state = dataclasses.replace(state, rows=rows)
            course.began -= state.seconds
            states.restore(state, self.model, self.optimizer, self.strategy)
            if mover:
                mover.restore(state.moves)
        self.engine = self.engines.of(decision)
        self._take_over()
        if not state:
            self._row(course, None, last=stop == start)
        while course.state.step < stop and not self.model.stop_training:
            if not self._blocks(course):
                self._block(course, capture)
        if not course.looked_at:
            self.engine.sync()
        pruning.check(self.model, self.optimizer)
        hooks.on_train_end()
        values = {name: v.numpy() for name, v in pruning.weights(self.model).items()}
        rows = list(course.state.rows)
        mask, updates = pruning.get_mask(self.model), mover.updates if mover else []
        return Trained(values, rows, rewind.captured, mask, decision, updates)

    def _take_over(self) -> None:
        """Has the engine go on from the variables, under the mask in force."""
        self.engine.begin(pruning.get_mask(self.model))
        self._mask_number = pruning.masks_set(self.model)

    def _tell(self, course: _Course, event: str, *given: Any) -> None:
        """Tells callbacks of an event; those of people's own may look at variables or set them."""
        if course.looked_at:
            self.engine.sync()
        getattr(course.hooks, event)(*given)
        if course.looked_at and self.engine.apart:
            self._take_over()

    def _blocks(self, course: _Course) -> bool:
        """Goes on by several evaluations at once, if nothing else is due; False: by none."""
        state, every = course.state, self.spec.eval_every
        if state.step != state.since or course.looked_at or not self.engine.blocks:
            return False
        end = schedules.next_boundary(
            state.step, course.stop, every=[self.spec.checkpoint_every],
            at=[state.step + min(self._pace, self.feed.most), *course.boundaries(state.step)],
        )  # fmt: skip
        if course.mover and (update := course.mover.course.next(state.step)) is not None:
            end = min(end, update)
        end -= end % every
        if state.step % every or end <= state.step:
            return False
        began, before = time.perf_counter(), course.seconds()
        counted = [row for row in state.rows if row["step"] >= course.settled]
        best = min([row["validation_loss"] for row in counted], default=math.inf)
        found, bad = self.engine.course(state.step, end, course.seed, best)
        self._require_finite(state.step, -1 if bad == end - state.step else bad)
        self._keep_pace(time.perf_counter() - began)
        each = (course.seconds() - before) / len(found)  # which took how long nobody knows
        for i, (total, *sums) in enumerate(found, 1):
            hooks, first = course.hooks, state.step
            hooks.on_epoch_begin(len(state.rows) - 1)
            hooks.on_train_batch_begin(first)
            state.step, loss = first + every, total / every
            hooks.on_train_batch_end(state.step - 1, {"loss": loss, "step": state.step})
            sizes = [self.feed.sizes[part] for part in ("validation", "test") for _ in range(2)]
            means = [value / size for value, size in zip(sums, sizes, strict=False)]
            self._row(course, loss, state.step == course.stop, (*means, before + i * each))
            state.since = state.step
        self._pause(course, self._stops(course.asked))
        return True

    def _block(self, course: _Course, capture: int | None) -> None:
        """Goes on to the next boundary, in pieces of some seconds, and does what is due there."""
        state, every = course.state, self.spec.eval_every
        if state.step == state.since:
            self._tell(course, "on_epoch_begin", len(state.rows) - 1)
        most = state.since + ((state.step - state.since) // CHUNK + 1) * CHUNK
        end = schedules.next_boundary(
            state.step, course.stop, every=[every], at=[most, *course.boundaries(state.step)]
        )
        self._tell(course, "on_train_batch_begin", state.step)
        while True:
            if course.mover and course.mover.course.due(state.step):
                piece = state.step + 1
                self._move(course, course.mover)
            else:
                update = course.mover.course.next(state.step) if course.mover else None
                at = [state.step + self._pace, update]
                piece = schedules.next_boundary(
                    state.step, end, every=[self.spec.checkpoint_every], at=at
                )
                state.total = self.advance(state.step, piece, course.seed, state.total)
            state.step, stops = piece, self._stops(course.asked)
            if state.step == end:
                break
            self._pause(course, stops)
        loss = state.total / (state.step - state.since)
        if state.step == capture and not course.looked_at:
            self.engine.sync()
        self._tell(course, "on_train_batch_end", state.step - 1, {"loss": loss, "step": state.step})
        last = state.step == course.stop or bool(self.model.stop_training)
        if state.step % every == 0 or last:
            self._row(course, loss, last)
            state.since, state.total = state.step, 0.0
        if not self.model.stop_training:
            self._pause(course, stops)

    def _move(self, course: _Course, mover: Mover) -> None:
        """Does a step at which the mask moves; where that takes a gradient, nothing else."""
        step, state = course.state.step, course.state
        if not mover.skips(step):
            state.total = self.advance(step, step + 1, course.seed, state.total)
        self.engine.sync()
        loss = mover.update(step, course.seed)
        if mover.skips(step):
            self._require_finite(step, -1 if math.isfinite(loss) else 0)
            state.total += loss
            optimizer = pruning.inner_optimizer(self.optimizer)
            optimizer.iterations.assign_add(1)  # by which the learning rate goes
        self._take_over()

    def _pause(self, course: _Course, stops: bool) -> None:
        """Keeps the state, where that is due, and stops, where that was asked."""
        state, every = course.state, self.spec.checkpoint_every
        if state.step == course.stop:
            return
        if course.keep and (stops or (every and state.step % every == 0)):
            self.engine.sync()
            course.keep(
                dataclasses.replace(
                    state,
                    rows=tuple(state.rows),
                    seconds=course.seconds(),
                    variables=states.read(self.model, self.optimizer, self.strategy),
                    mask=pruning.get_mask(self.model),
                    moves=course.mover.state() if course.mover else {},
                )
            )
        if stops:
            what = "is kept" if course.keep else "is lost"
            raise Interrupted(f"stopped at step {state.step} of {course.stop}, whose state {what}")

    def advance(self, step: int, end: int, seed: int, total: float = 0.0) -> float:
        """Does the steps step .. end - 1, at most CHUNK, in one call; adds their losses to `total`.

        One after the other, so that the sum does not depend on how many calls there are.

        Args:
          step, end: the first step, and the one after the last.
          seed: of the order of examples.
          total: the sum so far.

        Raises:
          DivergedError: a loss is NaN or infinite; names the step.
        """
        if pruning.masks_set(self.model) != self._mask_number:
            self._take_over()
        began = time.perf_counter()
        total, bad = self.engine.advance(step, end, seed, total)
        self._require_finite(step, bad)
        self._keep_pace(time.perf_counter() - began)
        return total

    def _require_finite(self, step: int, bad: int) -> None:
        if bad >= 0:
            raise DivergedError(
                f"the training loss is not finite at step {step + bad}; lower "
                f"--learning_rate (now {self.spec.learning_rate:g}) or use --warmup_steps"
            )

    def _keep_pace(self, seconds: float) -> None:
        """Has the next call do more or fewer steps, as the last one was quick or slow."""
        if seconds < _SECONDS / 5:
            self._pace = min(4 * self._pace, CHUNK)
        elif seconds > _SECONDS:
            self._pace = max(self._pace // 2, 1)

    def _stops(self, asked: Callable[[], bool]) -> bool:
        """Whether any worker is asked to stop; all get the chief's pace, too."""
        if self.workers.count == 1:
            return asked()
        mine = [float(asked()), self._pace if self.workers.chief else 0.0]
        stops, pace = self.workers.add([np.array(mine)])[0]
        self._pace = int(pace)
        return stops > 0

    def _row(
        self, course: _Course, loss: float | None, last: bool, found: Sequence[float] = ()
    ) -> None:
        """Evaluates, and writes a row; `loss` is None at the beginning of a training.

        What was evaluated before is `found`: loss and metric on the validation part and on the
        test part, NaN where that was not looked at, and the seconds.
        """
        for variable in self._averaged:  # what is evaluated is what will be saved
            variable.assign(variable.read_value())
        rows: Any = course.state.rows
        step, metric = course.state.step, self.task.metric
        validation_loss, validation_metric = found[:2] or self.evaluate("validation")
        if not math.isfinite(validation_loss):
            raise DivergedError(
                f"the validation loss is not finite at step {step}; lower --learning_rate (now "
                f"{self.spec.learning_rate:g}) or use --warmup_steps"
            )
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "validation_loss": validation_loss,
            f"validation_{metric}": validation_metric,
            "test_loss": None,
            f"test_{metric}": None,
            "learning_rate": self._rate_at(step if found else None),
        }
        counted = [r for r in rows if r["step"] >= course.settled or step < course.settled]
        if last or all(validation_loss < r["validation_loss"] for r in counted):
            seen = bool(found) and not math.isnan(found[3])
            row["test_loss"], row[f"test_{metric}"] = found[2:4] if seen else self.evaluate("test")
        if self._measures:
            row |= self._flows(course)
        row["seconds"] = found[4] if found else course.seconds()
        rows.append(row)
        if loss is not None:
            self._tell(course, "on_epoch_end", len(rows) - 2, dict(row))

    def _flows(self, course: _Course) -> dict[str, float]:
        """The gradient flow now, of the next step's batch and of the first step's."""
        source, mask = self.engines.of(Decision()), pruning.get_mask(self.model)
        self.engine.sync()
        first = course.state.rows[0]["step"] if course.state.rows else course.state.step
        values = (
            flow(gradients_at(source, self.model, step, course.seed)[1], mask)
            for step in (course.state.step, first)
        )
        return dict(zip(states.MEASURED, values, strict=True))

    def _in_columns(self, row: dict[str, Any]) -> dict[str, Any]:
        """An evaluation of before a training was asked to measure more, or less."""
        others = {name: v for name, v in row.items() if name not in states.MEASURED}
        wanted = states.MEASURED if self._measures else ()
        return others | {name: row.get(name) for name in wanted}

    def _rate_at(self, step: int | None) -> float:
        """The learning rate now, or at a step."""
        optimizer = pruning.inner_optimizer(self.optimizer)
        rate = rate_of(optimizer)
        at = optimizer.iterations if step is None else step
        value = rate(at) if callable(rate) else rate
        return float(keras.backend.get_value(value))

