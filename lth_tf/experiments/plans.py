"""Plans: what an experiment will do, before it does anything."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lth_tf import models, pruning, schedules
from lth_tf.errors import UserError
from lth_tf.experiments import branches, picking
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
    """

    shapes: dict[str, tuple[int, ...]]
    rates: dict[str, float]
    densities: list[dict[str, float]]
    controls: dict[int, tuple[str, ...]]
    trainings: int
    steps: int

    def kept(self, level: int) -> dict[str, int]:
        """Returns how many weights of each kernel a level keeps under layerwise pruning."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return {name: count(d, sizes[name]) for name, d in self.densities[level].items()}


def plan(spec: Spec, input_shape: tuple[int, ...], classes: int) -> Plan:
    """Returns what `imp` or `one_shot` would do.

    Raises:
      UserError: a density that cannot be reached, control levels that do not exist, or a
        control that such tickets cannot have.
    """
    model = models.build(spec, input_shape, classes, spec.seed)
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(model).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    rates: dict[str, float] = {}
    if spec.recipe == "one_shot":
        densities = picking.densities(spec, sizes)
        if spec.min_per_layer or spec.scope != "global":  # whose budgets may not be possible
            blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
            for each in densities[1:]:
                SCOPES[spec.scope](blank, each, min_per_layer=spec.min_per_layer)
    else:
        rates = _rates(spec, pruning.kinds(model))
        densities = schedules.level_densities(
            sizes,
            rates,
            levels=spec.levels if spec.target_density is None else None,
            target_density=spec.target_density,
            one_shot=spec.one_shot,
        )
        if empty := [n for n, d in densities[-1].items() if not count(d, sizes[n])]:
            raise UserError(
                f"nothing would be left of {', '.join(empty)} at the last level, which would cut "
                "the network; ask for fewer levels or a higher density"
            )
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
    first, end = spec.retrain_span
    dense = spec.recipe == "imp" or spec.dense
    fresh = end if spec.retrain == "rewind" else end - first  # a control may have no past
    extra = sum(len(names) for names in controls.values())
    steps = dense * spec.train_steps + last * (end - first) + extra * fresh
    return Plan(
        shapes,
        rates,
        densities,
        controls,
        (dense + last + extra) * spec.replicates,
        steps * spec.replicates,
    )


def _rates(spec: Spec, kinds: Mapping[str, str]) -> dict[str, float]:
    """Kernel name -> fraction of its weights that a level removes."""
    own = {"conv": spec.prune_fraction_conv, "output": spec.prune_fraction_output, "dense": None}
    rates = {
        name: spec.prune_fraction if own[kind] is None else float(own[kind] or 0)
        for name, kind in kinds.items()
    } | dict.fromkeys(picking.protected(spec, kinds), 0.0)
    if spec.levels and not any(rates.values()):
        raise UserError("nothing would ever be pruned: every prune fraction is 0")
    return rates
