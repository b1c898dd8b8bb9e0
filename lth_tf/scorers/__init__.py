"""Scorers: which weights matter. (model, kernels, batches, *, options) -> scores, higher = keep.

The model is a plain one and stays as it is, bit for bit; `kernels` are the values to score
at, name -> array, which need not be the model's own (zeros where a mask has them);
batches yield (inputs, int labels), as much at a time as goes into memory at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import masks, pruning, schedules
from lth_tf.errors import UserError
from lth_tf.masks import Mask, Scores
from lth_tf.registry import Registry
from lth_tf.scopes import SCOPES, Density
from lth_tf.scorers.baselines import magnitude, random
from lth_tf.scorers.batches import Batch
from lth_tf.scorers.fisher import fisher_diag, fisher_taylor
from lth_tf.scorers.grasp import grasp
from lth_tf.scorers.hutchinson import hessian_diag
from lth_tf.scorers.losses import LOSSES
from lth_tf.scorers.network import Reused
from lth_tf.scorers.snip import snip
from lth_tf.scorers.synflow import synflow
from lth_tf.spec import Spec

Scorer = Callable[..., Scores]
# What others need to know: in how many rounds it is used, whether it is drawn by its seed, and
# (options) -> whether scores can be negative.
SCORERS: Registry[Scorer] = Registry(
    "scorer", rounds=1, draws=False, signed=lambda options: False
)
SCORERS.register("fisher_diag")(fisher_diag)
SCORERS.register("fisher_taylor", signed=lambda options: True)(fisher_taylor)
SCORERS.register("grasp", signed=lambda options: options.get("variant") != "absolute")(grasp)
SCORERS.register("hessian_diag", signed=lambda options: True)(hessian_diag)
SCORERS.register("magnitude")(magnitude)
SCORERS.register("random", draws=True)(random)
SCORERS.register("snip")(snip)
SCORERS.register("synflow", rounds=100)(synflow)  # Tanaka et al. 2020, section 6

__all__ = [
    "LOSSES", "SCORERS", "Scorer", "TiedScores", "field_of", "looks_at_data", "one_shot_mask",
    "options_of", "score", "ties",
]  # fmt: skip


def options_of(scorer: str) -> dict[str, inspect.Parameter]:
    """Returns the options of a scorer: the parameters of its function after the `*`."""
    parameters = inspect.signature(SCORERS[scorer], eval_str=True).parameters
    return {name: p for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY}


def field_of(scorer: str, option: str) -> str | None:
    """Returns the field of Spec that has a scorer's option, or None: `Spec.scorer_options` has it.

    That of the scorer alone, or of all scorers: 'grasp_variant', 'score_loss'.
    """
    fields = {field.name: field.metadata for field in dataclasses.fields(Spec)}
    for name in (f"{scorer}_{option}", f"score_{option}"):
        if name in fields:
            return name
    return option if option in fields and fields[option].get("scorer") == scorer else None


def looks_at_data(scorer: str) -> bool:
    """Says whether a scorer needs batches: its function has no default for them."""
    batches = inspect.signature(SCORERS[scorer]).parameters.get("batches")
    return batches is not None and batches.default is batches.empty


def score(
    model: Any, scorer: str, batches: Iterable[Batch] | None = None, **options: Any
) -> Scores:
    """Returns the scores of a model's weights as they are now; the model is left untouched.

    Args:
      model: a built tf_keras model, plain or pruned: functional, Sequential, nested or
        subclassed. A mixed-precision model is scored in float32.
      scorer: a key of SCORERS.
      batches: (inputs, int labels [n]) where the scorer looks at data; inputs as the model
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
        return function(plain, _values(plain), _walked_again(batches), **options)


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
      Kernel name -> uint8 array. Where a cut falls among many equal scores, a `TiedScores` warning
      says so.

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
    initial, reused, parts = _values(model), Reused(model), _walked_again(batches)
    mask: Mask | None = None
    said = ""
    rounds = SCORERS.about(scorer).rounds if rounds is None else rounds
    for number, at in enumerate(schedules.round_densities(density, rounds, schedule), 1):
        now = initial if mask is None else masks.apply(mask, initial)
        scores = function(reused, now, parts, **options)
        if transform:
            scores = {name: _transformed(transform, s) for name, s in scores.items()}
        before, mask = mask, choose(scores, at, within=mask, min_per_layer=min_per_layer)
        if not said and (tie := ties(scores, at, mask, before, scope)):
            said = f"round {number} of {rounds}: {tie}" if rounds > 1 else tie
    assert mask is not None
    if said:
        warnings.warn(said, TiedScores, stacklevel=2)
    return mask


class TiedScores(UserWarning):
    """Many weights were kept or pruned by their position alone, since their scores are equal."""


def ties(scores: Scores, at: Density, mask: Mask, before: Mask | None, scope: str) -> str:
    """Returns what is to be said of equal scores that a cut falls among; '' where nothing.

    Args:
      scores: what was ranked.
      at: the density asked for, or kernel name -> density; protected kernels are left out.
      mask: what the scope made of it.
      before: the mask that it was made within.
      scope: a key of SCOPES.
    """
    free = {n: s for n, s in scores.items() if not isinstance(at, Mapping) or at[n] < 1}
    found = masks.tied(free, mask, before, pooled=SCOPES.about(scope).pooled)
    return masks.said_of_ties(found, masks.kept({n: mask[n] for n in free}))


def _transformed(transform: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    found = transform(array)
    if np.shape(found) != array.shape:
        raise UserError(
            f"transform made shape {np.shape(found)} of scores of shape {array.shape}; it must "
            "leave the shape as it is"
        )
    return found


def _values(plain: Any) -> dict[str, np.ndarray]:
    return {name: v.numpy() for name, v in pruning.kernels(plain).items()}


def _walked_again(batches: Iterable[Batch] | None) -> Sequence[Batch] | None:
    """What can be walked again and gives the same, shuffled or not; sequences are taken as such."""
    if batches is not None and not isinstance(batches, Iterable):
        raise UserError(
            f"batches must be an iterable of (inputs, labels), not {type(batches).__name__}"
        )
    return batches if batches is None or isinstance(batches, Sequence) else list(batches)


def _with_options(scorer: str, options: dict[str, Any]) -> Scorer:
    """The scorer; its options are checked, and a loss that is given by name looked up."""
    function, known = SCORERS[scorer], options_of(scorer)
    for name in options:
        if name not in known:
            raise UserError(
                f"scorer {scorer!r} has no option {name!r}; it has: {', '.join(known) or 'none'}"
            )
        default, value = known[name].default, options[name]
        if type(default) in (int, float) and not isinstance(value, numbers.Real):
            raise UserError(f"{name} of scorer {scorer!r} must be a number, not {value!r}")
    if isinstance(options.get("loss"), str):
        options["loss"] = LOSSES[options["loss"]]
    return function
