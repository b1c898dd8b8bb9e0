"""Masks that move: the updates of a method within a training.

Between two steps the host ranks weights and puts another mask in force (`dynamic.move`), with new
weights at zero or as initialised, and their slots zero. What the ranking needs of a gradient comes
from a pass over the batch of the update's step, in which pruned weights count as well as kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from lth_tf import masks, pruning
from lth_tf.dynamic import METHODS, Course, move
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import parts, rate_of

# What is told of an update, see `Mover`.
UPDATE = (
    "step", "density", "fraction", "changed", "explored",
    "gradient_flow_before", "gradient_flow_after",
)  # fmt: skip

_SET = 21  # a stream of random numbers drawn from a ticket's seed


class Gradients(Protocol):
    """Where gradients of pruned weights come from: a loop, or somebody's `fit`.

    Attributes:
      average: of each kernel the moving average of its gradient, as variables; None: there is none.
    """

    average: list[Any] | None

    def dense_gradients(
        self, step: int, seed: int, held_out: bool
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the loss of a step's batch, and kernel name -> gradient, over all replicas.

        Args:
          step: which.
          seed: of the order of examples.
          held_out: whether it is a batch of the validation part instead.
        """
        ...


def gradients_at(
    source: Gradients, model: Any, step: int, seed: int, held_out: bool = False
) -> tuple[float, dict[str, np.ndarray]]:
    """Returns what `Gradients.dense_gradients` does; statistics and counts stay as they are.

    Args:
      source: of gradients.
      model: whose they are.
      step, seed, held_out: see there.
    """
    others = [
        (part, part.numpy())
        for v in pruning.weights(model).values() if not v.trainable
        for part in parts(v)
    ]  # fmt: skip
    found = source.dense_gradients(step, seed, held_out)
    for variable, value in others:
        variable.assign(value)
    return found


def flow(gradients: Mapping[str, np.ndarray], mask: Mask) -> float:
    """Returns the gradient flow: the sum of g^2 over kept weights (Evci et al. 2022, section 2).

    Args:
      gradients: kernel name -> array.
      mask: kernel name -> 0/1 array.
    """
    kept = (gradients[name][m != 0].astype(np.float64) for name, m in mask.items())
    return float(sum(np.dot(g, g) for g in kept))


class Mover:
    """Moves the mask of a training.

    Args:
      course: when, and by how much.
      final: kernel name -> weights to keep in the end.
      drawn: path -> array: where new weights start, if not at zero.
      fresh: whether a weight that is dropped and grown again starts anew.
      trains: whether the step of an update by gradient also trains the weights.
      held_out: whether that gradient is of validation examples.
      seed: of what is drawn.
      measures: whether each update measures the gradient flow of its step's batch, before and
        after.

    Attributes:
      ever: kernel name -> bool array, which weights were ever kept.
      updates: a dict per update: step; density after it; fraction, what of each kernel was to be
        replaced; changed, how many weights that were not kept before are kept now; explored, the
        share of weights that were ever kept (R_s of Liu et al. 2021, "Do we actually need dense
        over-parameterization?"); and where it `measures` gradient_flow_before and
        gradient_flow_after.
    """

    def __init__(
        self, course: Course, final: Mapping[str, int], *,
        drawn: Mapping[str, np.ndarray] | None = None, fresh: bool = False, trains: bool = False,
        held_out: bool = False, seed: int = 0, measures: bool = False,
    ):  # fmt: skip
        self.measures = measures
        self.course, self.final, self.drawn = course, dict(final), drawn
        self.fresh, self.trains, self.held_out, self.seed = fresh, trains, held_out, seed
        self.method = METHODS[course.method]
        self.ever: dict[str, np.ndarray] = {}
        self.updates: list[dict[str, float]] = []

    def begin(self, model: Any, optimizer: Any, mask: Mask, source: Gradients) -> None:
        """Takes note of how a training begins.

        Args:
          model: a pruned model.
          optimizer: that trains it.
          mask: kernel name -> 0/1 array.
          source: of gradients.
        """
        self._model, self._optimizer, self._source = model, optimizer, source
        self._initial = {name: int(np.count_nonzero(m)) for name, m in mask.items()}
        self.ever = {name: m != 0 for name, m in mask.items()}
        self.updates = []
        for variable in source.average or []:
            variable.assign(np.zeros(variable.shape, variable.dtype.as_numpy_dtype))

    @property
    def explored(self) -> float:
        """The share of weights that were ever kept."""
        return masks.density({name: m.astype(np.uint8) for name, m in self.ever.items()})

    @property
    def settled(self) -> int:
        """The step from which on the density is what it will be."""
        return self.course.last + 1 if self.method.falls else 0

    def skips(self, step: int) -> bool:
        """Says whether a step updates the mask and does not train."""
        return self.course.due(step) and self.method.looks and not self.trains

    def targets(self, step: int) -> dict[str, int]:
        """Returns how many weights each kernel keeps after the update at a step."""
        return {
            name: round(self.course.density(step, many, self.final[name]))
            for name, many in self._initial.items()
        }

    def update(self, step: int, seed: int) -> float:
        """Moves the mask; returns the loss of the batch, where one was looked at, else 0.

        Args:
          step: the step whose update it is.
          seed: of the order of examples.
        """
        model, optimizer = self._model, self._optimizer
        kernels = pruning.kernels(model)
        mask = pruning.get_mask(model)
        weights = {name: kernels[name].numpy() for name in mask}
        loss, growth = self._growth(step, seed, mask)
        flows = []
        if self.measures and growth and self.method.looks and not self.held_out:
            flows = [flow(growth, mask)]  # of the batch that was looked at already
        elif self.measures:
            flows = [self._flow(step, seed, mask)]
        fraction = self.course.fraction(step, self._rate())
        new = move(
            mask, weights, growth, targets=self.targets(step), fraction=fraction,
            pooled=self.method.pooled,
        )  # fmt: skip
        born = {name: (m != 0) & (mask[name] == 0) for name, m in new.items()}
        changed = sum(int(np.count_nonzero(b)) for b in born.values())
        if self.fresh:  # what was dropped and comes back is born as well
            many = self.targets(step)
            born = {n: (m != 0) & ~self._stayed(mask[n], weights[n], new[n], many[n], step)
                    for n, m in new.items()}  # fmt: skip
        staying = {name: m & ~born[name] for name, m in new.items()}
        pruning.set_mask(model, new, optimizer, staying=staying)
        if self.drawn is not None:
            for name, at in born.items():
                value = np.where(at, self.drawn[name], kernels[name].numpy())
                kernels[name].assign(value.astype(weights[name].dtype))
        for name, m in new.items():
            self.ever[name] |= m != 0
        if self.measures:
            flows.append(self._flow(step, seed, new))
        numbers = step, masks.density(new), fraction, changed, self.explored, *flows
        self.updates.append(dict(zip(UPDATE, numbers, strict=False)))
        return loss

    def _flow(self, step: int, seed: int, mask: Mask) -> float:
        _, gradients = gradients_at(self._source, self._model, step, seed)
        return flow(gradients, mask)

    def _stayed(
        self, mask: np.ndarray, weights: np.ndarray, new: np.ndarray, target: int, step: int
    ) -> np.ndarray:
        """Which weights an update did not even drop."""
        sizes = {"": weights}
        many = int(self.course.fraction(step, self._rate()) * target + 1e-9)
        return move({"": mask}, sizes, None, targets={"": target - many})[""] != 0

    def _rate(self) -> float:
        """The learning rate over that of the first update."""
        inner = pruning.inner_optimizer(self._optimizer)
        rate, iterations = rate_of(inner), inner.iterations
        if not callable(rate):
            return 1.0
        first = float(rate(self.course.first))
        return float(rate(iterations)) / first if first else 0.0

    def _growth(
        self, step: int, seed: int, mask: Mask
    ) -> tuple[float, dict[str, np.ndarray] | None]:
        """The loss of the batch, or 0, and what is grown by: kernel name -> array, or None."""
        if self.method.grow == "random":
            rng = np.random.default_rng([self.seed, _SET, step])
            return 0.0, {name: rng.random(m.shape) for name, m in mask.items()}
        if self.method.grow == "momentum":
            averages = zip(mask, self._source.average or [], strict=True)
            return 0.0, {n: np.abs(v.numpy()) for n, v in averages}
        if self.method.grow == "gradient":
            loss, gradients = gradients_at(
                self._source, self._model, step, seed, self.held_out
            )
            return loss, {name: np.abs(g) for name, g in gradients.items()}
        return 0.0, None

    # --- Checkpoints ---

    def state(self) -> dict[str, np.ndarray]:
        """Returns what has to be known to go on, besides variables and mask."""
        found = {f"ever:{name}": np.packbits(m) for name, m in self.ever.items()}
        for name, v in zip(self.ever, self._source.average or [], strict=False):
            found[f"average:{name}"] = v.numpy()
        told = [[each.get(name, np.nan) for name in UPDATE] for each in self.updates]
        return {**found, "updates": np.array(told, np.float64).reshape(-1, len(UPDATE))}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Goes on from what `state` returned.

        Raises:
          UserError: it lacks something.
        """
        try:
            for name, m in self.ever.items():
                bits = np.unpackbits(arrays[f"ever:{name}"], count=m.size)
                self.ever[name] = bits.reshape(m.shape) != 0
            for name, v in zip(self.ever, self._source.average or [], strict=False):
                v.assign(arrays[f"average:{name}"])
            told = arrays["updates"] if "updates" in arrays else np.zeros((0, len(UPDATE)))
            self.updates = [
                {name: float(x) for name, x in zip(UPDATE, row, strict=True) if x == x}
                for row in told
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                "a checkpoint of a training whose mask moves does not tell how far it is; delete "
                "the level's checkpoint_* files to train it anew"
            ) from error
