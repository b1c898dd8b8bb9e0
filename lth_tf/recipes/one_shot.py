"""Pruning before training: tickets picked by scores of the initial weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lth_tf.errors import UserError
from lth_tf.recipes.record import Levels, Recipe, protected
from lth_tf.scopes import SCOPES, count


def levels(
    spec: Any, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> Levels:
    """Returns the densities of all levels: a level for each density asked for.

    Args:
      spec: the experiment.
      shapes: kernel name -> shape.
      kinds: not looked at.

    Raises:
      UserError: see `densities`; or a scope that cannot divide them so.
    """
    found = densities(spec, {name: math.prod(shape) for name, shape in shapes.items()})
    if spec.min_per_layer or spec.scope != "global":  # whose budgets may not be possible
        blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
        for each in found[1:]:
            SCOPES[spec.scope](blank, each, min_per_layer=spec.min_per_layer)
    return Levels(found)


def densities(spec: Any, sizes: Mapping[str, int]) -> list[dict[str, float]]:
    """Returns for every level, 0 included, the density of every kernel.

    Args:
      spec: the experiment; its densities are those of the network as a whole.
      sizes: kernel name -> number of weights. Protected kernels are kept whole, the others
        share what is left.

    Raises:
      UserError: a density keeps all weights or none, as many as another, or fewer than the
        protected kernels have.
    """
    whole = protected(spec.protect, sizes)
    total, fixed = sum(sizes.values()), sum(sizes[name] for name in whole)
    if fixed == total:
        raise UserError(f"protect {','.join(spec.protect)!r} leaves nothing that could be pruned")
    found = [dict.fromkeys(sizes, 1.0)]
    given: dict[int, float] = {total: 1.0}
    for density in spec.density:
        if (number := count(density, total)) in given:
            other = given[number]
            raise UserError(
                f"density {density} removes none of the {total} weights; ask for less"
                if number == total
                else f"the densities {other} and {density} both keep {number} of {total} "
                "weights; give one of them"
            )
        given[number] = density
        rest = number - fixed
        if rest <= 0:
            what = f"the {fixed} of the protected kernels" if fixed else "nothing"
            raise UserError(
                f"density {density:g} of {total} weights leaves {what}; ask for "
                f"{math.ceil((fixed + 1) / total * 1e6) / 1e6:g} or more"
            )
        share = density if not fixed else rest / (total - fixed)
        found.append({name: 1.0 if name in whole else share for name in sizes})
    return found


def steps(lab: Any, replicate: int) -> None:
    """Picks a ticket of each density out of the same initial weights, and trains it."""
    folder, dense = lab.folder(replicate), lab.dense(replicate)
    if lab.spec.dense and lab.trains:
        lab.later(folder / "level_00", lab.ticket(folder / "level_00", lambda: dense))
    for level in lab.levels:
        here = folder / f"level_{level:02d}"
        ticket = lab.ticket(here, lab.pick, dense, level)
        if lab.trains:
            lab.later(here, ticket)
            lab.branches(here, ticket, dense.weights)


def _says(spec: Any, levels: int, rounds: int) -> str:
    return (
        f"picked at initialisation by {spec.scorer} in {rounds} round(s), scope {spec.scope}; "
        "densities " + ", ".join(f"{d:.3%}" for d in spec.density)
    )


ONE_SHOT = Recipe(
    tool="lth-oneshot",
    module="one_shot",
    help="weights at initialisation",
    fields=(
        "density", "dense", "scorer", "scorer_options", "rounds", "round_schedule", "temperature",
        "score_batch_size", "score_batch_norm", "warm_batch_norm", "score_loss", "sparse_init",
        "score_augmentation", "samples_per_class", "grasp_variant", "snip_variant", "min_per_layer",
    ),
    levels=levels,
    steps=steps,
    asked=lambda spec: spec.density,
    target="density",
    method=lambda spec: spec.scorer,
    has_dense=lambda spec: spec.dense,
    says=_says,
    picks=True,
    defaults={"scope": "global"},
)  # fmt: skip
