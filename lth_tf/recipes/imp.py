"""Iterative magnitude pruning: train, prune, rewind, again (Frankle and Carbin 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lth_tf import schedules
from lth_tf.errors import UserError
from lth_tf.recipes.record import Levels, Recipe, protected
from lth_tf.scopes import count


def levels(
    spec: Any, shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, str]
) -> Levels:
    """Returns the densities of all levels, and the rates that they follow from.

    Args:
      spec: the experiment.
      shapes: kernel name -> shape.
      kinds: kernel name -> 'conv', 'dense' or 'output'.

    Raises:
      UserError: nothing would ever be pruned, or nothing be left of a kernel.
    """
    rates, sizes = _rates(spec, kinds), {name: math.prod(shape) for name, shape in shapes.items()}
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
    _require_removal(spec, densities, sizes, kinds)
    return Levels(densities, rates)


def _rates(spec: Any, kinds: Mapping[str, str]) -> dict[str, float]:
    """Kernel name -> fraction of its weights that a level removes."""
    own = {"conv": spec.prune_fraction_conv, "output": spec.prune_fraction_output, "dense": None}
    rates = {
        name: spec.prune_fraction if own[kind] is None else float(own[kind] or 0)
        for name, kind in kinds.items()
    } | dict.fromkeys(protected(spec.protect, kinds), 0.0)
    if spec.levels and not any(rates.values()):
        raise UserError("nothing would ever be pruned: every prune fraction is 0")
    return rates


def _require_removal(
    spec: Any,
    densities: Sequence[Mapping[str, float]],
    sizes: Mapping[str, int],
    kinds: Mapping[str, str],
) -> None:
    """Raises UserError where a level, or a prune fraction in all of them, removes no weight.

    Args:
      spec: the experiment.
      densities: for each level, kernel name -> density.
      sizes: kernel name -> number of weights.
      kinds: kernel name -> 'conv', 'dense' or 'output'.
    """
    own = spec.scope == "layerwise"  # each kernel has a budget of its own
    counts = [
        {n: count(d, sizes[n]) for n, d in each.items()} if own
        else {"all": count(sum(d * sizes[n] for n, d in each.items()), 1)}
        for each in densities
    ]  # fmt: skip
    for level, (before, after) in enumerate(zip(counts, counts[1:], strict=False), 1):
        if before == after:
            what = "target_density" if spec.target_density is not None else "prune_fraction"
            raise UserError(
                f"level {level} would remove none of the {sum(before.values())} weights that are "
                f"left; {what} {getattr(spec, what):g} is too small a step: give another, or "
                "fewer levels"
            )
    for field, kind in (("prune_fraction_conv", "conv"), ("prune_fraction_output", "output")):
        names = [n for n, k in kinds.items() if k == kind and densities[-1][n] < 1]
        if getattr(spec, field) and names and own and all(
            counts[-1][n] == sizes[n] for n in names
        ):
            raise UserError(
                f"{field} {getattr(spec, field):g} removes no weight of {', '.join(names)} at any "
                "level; give 0, or a larger one"
            )


def steps(lab: Any, replicate: int) -> None:
    """Trains, prunes and rewinds, level after level, with the controls of each."""
    spec, folder = lab.spec, lab.folder(replicate)
    here, k = folder / "level_00", spec.rewind_at
    ticket = lab.ticket(here, lab.dense, replicate)
    initial, trained = ticket.weights, lab.train(here, ticket, capture=k or None)
    rewound = lab.rewound(here) if k else initial
    for level in lab.levels:
        here = folder / f"level_{level:02d}"
        start = rewound if spec.retrain == "rewind" else trained
        ticket = lab.ticket(here, lab.prune, ticket, trained, start, level)
        trained = lab.train(here, ticket)
        lab.branches(here, ticket, start)


def _says(spec: Any, levels: int, rounds: int) -> str | None:
    first, end = spec.retrain_span
    return f"after each pruning: {spec.retrain}, steps {first:,} to {end:,}" if levels else None


IMP = Recipe(
    tool="lth-imp",
    module="imp",
    help="trained weights, level after level",
    fields=(
        "prune_fraction", "prune_fraction_conv", "prune_fraction_output", "levels",
        "target_density", "one_shot", "rewind_step", "retrain", "retrain_steps",
    ),
    levels=levels,
    steps=steps,
    asked=lambda spec: [spec.target_density] if spec.target_density is not None else [],
    target="target_density",
    method=lambda spec: spec.recipe,
    says=_says,
    chained=True,
)  # fmt: skip
