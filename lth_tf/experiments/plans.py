"""Plans: what an experiment will do, before it does anything."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from lth_tf import models, pruning
from lth_tf.analysis import flops
from lth_tf.errors import UserError
from lth_tf.experiments import branches
from lth_tf.masks import Mask
from lth_tf.recipes import RECIPES
from lth_tf.scopes import SCOPES, count
from lth_tf.spec import Spec


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an experiment will do.

    Attributes:
      shapes: kernel name -> shape.
      rates: for imp kernel name -> fraction of its weights removed per level.
      densities: for each level, kernel name -> density.
      controls: level -> names of the branches run there.
      trainings: their number over all replicates, controls included.
      steps: their training steps in total.
      last: kernel name -> weights kept at the last level; empty where scores decide.
      flops: what summary.csv will tell of the last level's, where that is known before.
    """

    shapes: dict[str, tuple[int, ...]]
    rates: dict[str, float]
    densities: list[dict[str, float]]
    controls: dict[int, tuple[str, ...]]
    trainings: int
    steps: int
    last: dict[str, int] = dataclasses.field(default_factory=dict)
    flops: dict[str, float] = dataclasses.field(default_factory=dict)

    def kept(self, level: int) -> dict[str, int]:
        """Returns how many weights of each kernel a level keeps under layerwise pruning."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return {name: count(d, sizes[name]) for name, d in self.densities[level].items()}


def plan(
    spec: Spec,
    input_shape: tuple[int, ...],
    classes: int,
    blueprint: models.Blueprint | None = None,
) -> Plan:
    """Returns what `run` would do.

    Args:
      spec: the experiment.
      input_shape, classes: of its data set.
      blueprint: of the network, where others look at it, too.

    Raises:
      UserError: steps that are never come to, a density that cannot be reached, control
        levels that do not exist, or a control that such tickets cannot have.
    """
    models.require_network(spec, input_shape, classes)
    spec.require_effect()
    recipe = RECIPES[spec.recipe]
    model = (blueprint or models.Blueprint(spec, input_shape, classes)).plain
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(model).items()}
    densities, rates = recipe.levels(spec, shapes, pruning.kinds(model))
    for name in spec.controls:
        branches.require(name, spec)
    last = len(densities) - 1
    levels = spec.control_levels or range(1, last + 1)
    if bad := [level for level in levels if not 1 <= level <= last]:
        raise UserError(
            f"control_levels {bad} are out of range; controls run off pruned tickets, here "
            f"levels 1 to {last}"
        )
    controls = {level: spec.controls for level in levels if spec.controls}
    begin, end = spec.retrain_span
    dense = recipe.has_dense(spec)
    fresh = end if spec.retrain == "rewind" else end - begin  # a control may have no past
    extra = sum(len(names) for names in controls.values())
    steps = dense * spec.train_steps + last * (end - begin) + extra * fresh
    mask: Mask = {}
    told: dict[str, float] = {}
    if not SCOPES.about(spec.scope).pooled:  # how many weights are kept does not depend on scores
        equal = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        draw = functools.partial(SCOPES[spec.scope], equal, min_per_layer=spec.min_per_layer)
        mask, begins = draw(densities[-1]), recipe.begins(spec, densities[-1])
        first = mask if begins == densities[-1] else draw(begins)
        told = flops.of_training(model, spec, last, first, mask, end - begin)
    return Plan(
        shapes,
        dict(rates),
        densities,
        controls,
        (dense + last + extra) * spec.replicates,
        steps * spec.replicates,
        {name: int(np.count_nonzero(m)) for name, m in mask.items()},
        told,
    )
