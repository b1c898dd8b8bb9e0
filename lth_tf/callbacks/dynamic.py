"""Masks that move in a `fit` of one's own: RigL, SET, GraNet and GMP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lth_tf import masks, pruning
from lth_tf.callbacks.moving import Mover
from lth_tf.compat import keras, tf
from lth_tf.dynamic import METHODS, Course
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning import inside
from lth_tf.scopes import SCOPES

Loss = Callable[[Any, Any], Any]


class Moves(keras.callbacks.Callback):
    """Moves a pruned model's mask while `fit` trains it.

    Steps are counted by the optimizer. All replicas move the same entries: gradients are added
    up over them before weights are ranked.

    Args:
      until: the step from which on the mask stays; for a falling density that of the last update.
      every: steps between updates.
      density: of the mask that training ends with. Where the model's mask keeps all weights it is
        drawn at random, for the density that training begins with; None: the mask that there is.
      scope: a key of SCOPES: how the density is divided among kernels.
      seed: of what is drawn.
      drop_fraction: of a kernel's weights, replaced at the first update.
      schedule: a key of FRACTIONS: how that falls.
      since: the step of the first update where the density falls (default: `every`).
      initial_density: with which training begins, where it falls.
      loss: (model, batch) -> loss, for a model with a `train_step` of its own; the batch is what
        that is given.

    Attributes:
      explored: the share of weights that were ever kept.
      changed: how many weights the last update grew.

    Raises:
      UserError: there would be no update.
    """

    method = ""

    def __init__(
        self, until: int, *, every: int = 100, density: float | None = None, scope: str = "erk",
        seed: int = 0, drop_fraction: float = 0.3, schedule: str = "cosine", since: int = 0,
        initial_density: float | None = None, loss: Loss | None = None,
    ):  # fmt: skip
        super().__init__()
        self.course = Course(self.method, every, until, since, drop_fraction, schedule)
        self._about = METHODS[self.method]
        self.density, self.scope, self.seed, self.loss = density, scope, seed, loss
        begins = self._about.initial if initial_density is None else initial_density
        self._begins = begins if self._about.falls else density
        if self._about.falls and density is None:
            raise UserError(f"{type(self).__name__} needs a density to end with")
        if self._about.falls and density is not None and not density < begins <= 1:
            raise UserError(
                f"the density falls from {begins:g} (initial_density) to {density:g}: it must be "
                "lower in the end"
            )
        self._mover: Mover | None = None
        self._original: Any = None
        self._data: Any = None
        self.average = None

    @property
    def explored(self) -> float:
        """The share of weights that were ever kept."""
        return self._mover.explored if self._mover else 0.0

    @property
    def changed(self) -> int:
        """How many weights the last update grew."""
        updates = self._mover.updates if self._mover else []
        return int(updates[-1]["changed"]) if updates else 0

    # --- What `fit` calls ---

    def on_train_begin(self, logs: Any = None) -> None:
        """Draws the mask where there is none yet, and takes `fit`'s step over."""
        model = self.model
        if not pruning.is_pruned(model):
            raise UserError(f"model {model.name!r} is not pruned; call prune(model) first")
        optimizers = pruning.optimizers_of(model)
        if len(optimizers) != 1:
            raise UserError(
                f"model {model.name!r} has {len(optimizers)} optimizers; {type(self).__name__} is "
                "for models that one trains"
            )
        self._rule = optimizers[0]
        self._require_steps()
        pruning.create_slots(self._rule, model)
        mask = pruning.get_mask(model)
        if masks.density(mask) == 1 and self._begins not in (None, 1):
            mask = self._drawn(mask, float(self._begins or 1))
            pruning.set_mask(model, mask)
        final = mask
        if self._about.falls:
            final = self._drawn(mask, float(self.density or 1))
        counts = {name: int(np.count_nonzero(m)) for name, m in final.items()}
        if self._mover is None:  # a second `fit` goes on
            self._mover = Mover(self.course, counts, seed=self.seed)
            self._mover.begin(model, self._rule, mask, self)
        self._look = tf.function(self._of_batch)
        self._original = inside.replace_train_function(model, self._train)

    def on_train_end(self, logs: Any = None) -> None:
        """Gives `fit` its step back."""
        inside.replace_train_function(self.model, self._original)
        pruning.check(self.model, self._rule)

    def _require_steps(self) -> None:
        model, name = self.model, type(self).__name__
        many = inside.steps_in_a_call(model)
        if many != 1:
            raise UserError(
                f"{name} moves the mask between two steps, and this model does {many} in one call "
                "(steps_per_execution); compile it with 1"
            )
        own = type(model).train_step is not keras.Model.train_step
        if own and self._about.looks and self.loss is None:
            raise UserError(
                f"{type(model).__name__} has a train_step of its own, whose loss {name} cannot "
                f"know; give {name}(loss=...), a function of the model and a batch"
            )
        inner = pruning.inner_optimizer(self._rule)
        if getattr(inner, "gradient_accumulation_steps", None):
            raise UserError(
                f"the optimizer adds up gradients over several steps (gradient_accumulation_steps),"
                f" between which {name} would move the mask; leave that out"
            )

    def _drawn(self, like: Mask, density: float) -> Mask:
        rng = np.random.default_rng([self.seed, 31])
        return SCOPES[self.scope]({n: rng.random(m.shape) for n, m in like.items()}, density)

    def _train(self, iterator: Any) -> Any:
        """A step of `fit`, or an update of the mask."""
        assert self._mover is not None
        inner = pruning.inner_optimizer(self._rule)
        step = int(inner.iterations.numpy())
        if not self.course.due(step):
            return self._original(iterator)
        if not self._mover.skips(step):
            found = self._original(iterator)
            self._mover.update(step, self.seed)
            return found
        self._data = next(iterator)
        self._mover.update(step, self.seed)
        self._data = None
        inner.iterations.assign_add(1)  # by which the learning rate goes
        return {m.name: m.result() for m in self.model.metrics}

    # --- Gradients of pruned weights ---

    def dense_gradients(
        self, step: int, seed: int, held_out: bool
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of the batch at hand, and kernel name -> gradient.

        Args:
          step, seed, held_out: not looked at.
        """
        strategy = self.model.distribute_strategy
        loss, *gradients = self._look(self._data)
        add = tf.distribute.ReduceOp.SUM
        found = [strategy.reduce(add, g, None).numpy() for g in gradients]
        value = float(strategy.reduce(tf.distribute.ReduceOp.MEAN, loss, None))
        return value, dict(zip(pruning.kernels(self.model), found, strict=True))

    def _of_batch(self, data: Any) -> Any:
        return self.model.distribute_strategy.run(self._of_replica, (data,))

    def _of_replica(self, data: Any) -> list[Any]:
        model, kernels = self.model, list(pruning.kernels(self.model).values())
        with tf.GradientTape() as tape, pruning.dense_gradients():
            if self.loss:
                loss = self.loss(model, data)
            else:
                x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
                loss = model.compute_loss(x, y, model(x, training=True), weight)
        gradients = tape.gradient(loss, kernels)
        found = dict(zip(pruning.kernels(model), gradients, strict=True))
        if missing := [name for name, g in found.items() if g is None]:
            raise UserError(
                f"the loss has no gradient at {', '.join(missing)}, so that nothing can be grown "
                "there by gradient; prune other kernels only (prune(model, select=...))"
            )
        return [loss, *map(tf.convert_to_tensor, gradients)]


class RigL(Moves):
    """RigL: drops the smallest weights, grows those with the largest gradient of the batch.

    Evci et al. 2020, algorithm 1: the step of an update does not train. Arguments and attributes
    are those of `Moves`.
    """

    method = "rigl"


class SET(Moves):
    """SET: drops the smallest weights, grows others at random (Mocanu et al. 2018).

    The fraction stays as it is, unless `schedule` says otherwise. An update's step trains, too.
    Arguments and attributes are those of `Moves`.
    """

    method = "set"

    def __init__(self, until: int, *, schedule: str = "constant", **options: Any):
        super().__init__(until, schedule=schedule, **options)


class GraNet(Moves):
    """GraNet: from less to more sparse by magnitude, with growth by gradient (Liu et al. 2021).

    Arguments and attributes are those of `Moves`.
    """

    method = "granet"


class GMP(Moves):
    """GMP: from dense to sparse by magnitude, by the cubic schedule of Zhu and Gupta 2017.

    Arguments and attributes are those of `Moves`.
    """

    method = "gmp"
