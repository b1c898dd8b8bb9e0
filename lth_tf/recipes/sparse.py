"""Sparse training: tickets drawn at random, whose masks move while they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lth_tf.dynamic import METHODS, Course
from lth_tf.dynamic.methods import OPTIONS
from lth_tf.errors import UserError
from lth_tf.recipes import one_shot
from lth_tf.recipes.record import Levels, Recipe


def course(spec: Any) -> Course:
    """Returns when and by how much the masks of an experiment are updated.

    Args:
      spec: the experiment.

    Raises:
      UserError: an option that means nothing to its method, or no update in the training.
    """
    method = METHODS[spec.method]
    for name in OPTIONS:
        value = getattr(spec, name)
        if not method.has(name) and value != type(spec).default_of(name):
            having = ", ".join(m for m in METHODS if METHODS[m].has(name))
            raise UserError(
                f"{name} {value} has no meaning for --method={spec.method}, only for {having}"
            )
    if spec.update_until >= 1 and spec.update_until != int(spec.update_until):
        raise UserError(
            f"update_until {spec.update_until} is neither a whole step nor a fraction below 1"
        )
    until = spec.update_until if spec.update_until >= 1 else spec.update_until * spec.train_steps
    if until > spec.train_steps:
        raise UserError(
            f"update_until {int(until)} lies behind the end of training (train_steps "
            f"{spec.train_steps}); give a step before it, or a fraction below 1"
        )
    if method.moves and spec.update_every >= spec.train_steps:
        raise UserError(
            f"update_every {spec.update_every} is no less than train_steps {spec.train_steps}: "
            "the mask would never be updated"
        )
    return Course(
        spec.method, spec.update_every, round(until), spec.update_from, spec.drop_fraction,
        spec.fraction_schedule,
    )  # fmt: skip


def initial_density(spec: Any) -> float | None:
    """Returns the density that training begins with, where that is not the one it ends with."""
    method = METHODS[spec.method]
    if not method.falls:
        return None
    return method.initial if spec.initial_density is None else spec.initial_density


def begins(spec: Any, densities: Mapping[str, float]) -> dict[str, float]:
    """Returns the densities that a training begins with, kernel name -> density.

    Args:
      spec: the experiment.
      densities: those that it ends with.
    """
    at = initial_density(spec)
    return {name: d if d == 1 or at is None else at for name, d in densities.items()}


def levels(
    spec: Any, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> Levels:
    """Returns the densities of all levels: a level for each density asked for.

    Args:
      spec: the experiment.
      shapes: kernel name -> shape.
      kinds: not looked at.

    Raises:
      UserError: see `course` and `one_shot.levels`; or a density above the one begun with.
    """
    course(spec)
    found = one_shot.levels(spec, shapes, kinds)
    begins = initial_density(spec)
    if begins is not None and (above := [d for d in spec.density if d >= begins]):
        raise UserError(
            f"density {above[0]:g} is not below initial_density {begins:g}, from which "
            f"--method={spec.method} lets it fall"
        )
    return found


def steps(lab: Any, replicate: int) -> None:
    """Draws a mask of each density, and trains the same initial weights under it."""
    folder, dense = lab.folder(replicate), lab.dense(replicate)
    if lab.spec.dense:
        lab.later(folder / "level_00", lab.ticket(folder / "level_00", lambda: dense))
    for level in lab.levels:
        here = folder / f"level_{level:02d}"
        ticket = lab.ticket(here, lab.sow, dense, level)
        lab.later(here, ticket)
        lab.branches(here, ticket, dense.weights)


def _says(spec: Any, levels: int, rounds: int) -> str:
    moves = course(spec)
    if not moves.updates:
        return f"random masks that stay, scope {spec.scope}"
    return (
        f"{spec.method}: {moves.updates} updates of the mask, every {spec.update_every} steps from "
        f"{moves.first:,} to {moves.last:,}, scope {spec.scope}"
    )


SPARSE = Recipe(
    tool="lth-sparse",
    module="sparse",
    help="random ones that move while the network is trained",
    fields=("density", "dense", "min_per_layer", "sparse_init", "method", *OPTIONS),
    levels=levels,
    steps=steps,
    asked=lambda spec: spec.density,
    target="density",
    method=lambda spec: spec.method,
    has_dense=lambda spec: spec.dense,
    says=_says,
    begins=begins,
    settled=lambda spec: course(spec).last + 1 if METHODS[spec.method].falls else 0,
    moves=lambda spec: METHODS[spec.method].moves,
    defaults={"scope": "erk"},
)
