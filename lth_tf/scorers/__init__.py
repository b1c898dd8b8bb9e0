"""Scorers: which weights matter. (model, kernels, batches, *, options) -> scores, higher = keep.

The model is a plain one and stays as it is, bit for bit; `kernels` are the values to score
at, name -> array, which need not be the model's own (zeros where a mask has them);
batches yield (images, int labels), as much at a time as goes into memory at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lth_tf import masks, pruning, schedules
from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores
from lth_tf.registry import Registry
from lth_tf.scopes import SCOPES, Density
from lth_tf.scorers.baselines import magnitude, random
from lth_tf.scorers.batches import Batch
from lth_tf.scorers.grasp import grasp
from lth_tf.scorers.losses import LOSSES
from lth_tf.scorers.network import Reused
from lth_tf.scorers.snip import snip
from lth_tf.scorers.synflow import synflow

Scorer = Callable[..., Scores]
SCORERS: Registry[Scorer] = Registry("scorer")
for _scorer in (grasp, magnitude, random, snip, synflow):
    SCORERS.register(_scorer.__name__)(_scorer)

ROUNDS = {"synflow": 100}  # Tanaka et al. 2020, section 6; one for all others

__all__ = ["LOSSES", "ROUNDS", "SCORERS", "Scorer", "one_shot_mask", "score"]


def score(
    model: Any, scorer: str, batches: Iterable[Batch] | None = None, **options: Any
) -> Scores:
    """Returns the scores of a model's weights as they are now; the model is left untouched.

    Args:
      model: a built tf_keras model, plain or pruned: functional, Sequential, nested or
        subclassed. A mixed-precision model is scored in float32.
      scorer: a key of SCORERS.
      batches: (images, int labels [n]) where the scorer looks at data; images as the model
        takes them. One batch is in the scorer's memory at a time; a sequence that makes its
        batches when asked for them need not hold all.
      **options: the scorer's, e.g. temperature=200.0 for grasp; a loss also by its name.

    Returns:
      Kernel name -> array of the kernel's shape, higher = keep.

    Raises:
      UserError: an unknown scorer or option, a model without kernels, batches that do not fit,
        a loss that is not finite, a derivative that does not exist.
    """
    function = _with_options(scorer, options)
    pruning.require_model(model)
    with pruning.plain(model) as plain:
        return function(plain, _values(plain), _kept(batches), **options)


def one_shot_mask(
    model: Any,
    scorer: str,
    batches: Iterable[Batch] | None = None,
    *,
    density: Density,
    scope: str = "global",
    rounds: int | None = None,
    schedule: str = "exponential",
    min_per_layer: int | None = None,
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    **options: Any,
) -> Mask:
    """Returns the mask that prunes a model before training, in one round or in several.

    In round r of n the weights that are left are scored where the others are zero, and pruned
    to the density that `schedules.round_densities` gives: Tanaka et al. 2020, algorithm 1,
    for synflow; iterative SNIP or GraSP (de Jorge et al. 2021, section 4) for these. What
    a round removes does not come back.

    Args:
      model, scorer, batches, **options: see `score`.
      density: fraction to keep, or kernel name -> fraction.
      scope: a key of SCOPES.
      rounds: how many (default: 100 for synflow, else 1).
      schedule: 'exponential' or 'linear'.
      min_per_layer: what every kernel keeps at least; see `scopes`.
      transform: applied to each array of scores before it is ranked.

    Returns:
      Kernel name -> uint8 array.

    Raises:
      UserError: see `score` and `scopes`; or the model is pruned already.
    """
    function, choose = _with_options(scorer, options), SCOPES[scope]
    pruning.require_model(model)
    if pruning.is_pruned(model):
        raise UserError(
            f"model {model.name!r} is pruned already, and one_shot_mask starts from a dense one; "
            "to prune it further rank score(model, ...) within=get_mask(model)"
        )
    initial, reused, kept = _values(model), Reused(model), _kept(batches)
    mask: Mask | None = None
    rounds = ROUNDS.get(scorer, 1) if rounds is None else rounds
    for at in schedules.round_densities(density, rounds, schedule):
        now = initial if mask is None else masks.apply(mask, initial)
        scores = function(reused, now, kept, **options)
        if transform:
            scores = {name: transform(s) for name, s in scores.items()}
        mask = choose(scores, at, within=mask, min_per_layer=min_per_layer)
    assert mask is not None
    return mask


def _values(plain: Any) -> dict[str, np.ndarray]:
    return {name: v.numpy() for name, v in pruning.kernels(plain).items()}


def _kept(batches: Iterable[Batch] | None) -> Sequence[Batch] | None:
    """What can be walked again and gives the same, shuffled or not; sequences are taken as such."""
    return batches if batches is None or isinstance(batches, Sequence) else list(batches)


def _with_options(scorer: str, options: dict[str, Any]) -> Scorer:
    """The scorer; its options are checked, and a loss that is given by name looked up."""
    function = SCORERS[scorer]
    parameters = inspect.signature(function).parameters
    known = [name for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise UserError(
                f"scorer {scorer!r} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )
    if isinstance(options.get("loss"), str):
        options["loss"] = LOSSES[options["loss"]]
    return function
