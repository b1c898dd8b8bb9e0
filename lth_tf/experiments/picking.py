"""Tickets picked before training, as a spec asks for: scoring examples, options, mask."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, Streamed, scaling
from lth_tf.datasets.augmentation import augment
from lth_tf.errors import UserError
from lth_tf.models import plain_model, statistics
from lth_tf.scorers import LOSSES, SCORERS, field_of, looks_at_data, one_shot_mask, options_of
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import feeds

Transform = Callable[[np.ndarray], np.ndarray]

_SCORING = 3  # a stream of random numbers; 1 and 2 are those of `feeds`
_SCORING_STEP = 2**40


def balanced(labels: np.ndarray, classes: int, per_class: int, seed: int) -> np.ndarray:
    """Returns which examples to score on, int[classes * per_class]: as many of each class.

    One of each class, then another of each, so that every stretch is nearly balanced.

    Args:
      labels: int [n], of the examples to choose from.
      classes: how many there are.
      per_class: how many examples of each.
      seed: of what is drawn.

    Raises:
      UserError: a class has too few.
    """
    rng = np.random.default_rng([seed, _SCORING])
    rows = [rng.permutation(np.flatnonzero(labels == c))[:per_class] for c in range(classes)]
    if poor := [c for c, row in enumerate(rows) if len(row) < per_class]:
        raise UserError(
            f"samples_per_class {per_class} cannot be had: class {poor[0]} has "
            f"{len(rows[poor[0]])} training examples"
            + (f", and so {len(poor) - 1} more classes" if len(poor) > 1 else "")
        )
    return np.stack(rows, 1).reshape(-1)


class Batches(Sequence):
    """Micro-batches of examples to score on, each scaled when it is asked for.

    With score_augmentation also changed, as a function of (seed, position): see `augment`.

    Args:
      inputs: [n, ...], as the data set has them.
      labels: int32 [n].
      spec: score_batch_size, augmentation and scaling.
      dataset: mean and standard deviation.
      seed: of what augmentation draws.
    """

    def __init__(
        self, inputs: np.ndarray, labels: np.ndarray, spec: Spec, dataset: Any, seed: int
    ):
        count = -(-len(labels) // spec.score_batch_size)
        self.inputs, self.labels = np.array_split(inputs, count), np.array_split(labels, count)
        self.spec, self.dataset, self.seed = spec, dataset, seed
        self.first = np.cumsum([0, *map(len, self.labels)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        x, spec = self.inputs[i], self.spec
        kind = spec.augmentation if spec.score_augmentation else "none"
        # Of the seed's streams that of training starts at step 0.
        drawn = self.seed, _SCORING_STEP, int(self.first[i])
        if kind == "flip_crop":
            x = augment(tf.convert_to_tensor(x), kind, *drawn)
        x = scaling.scaled(x, self.dataset, spec)
        if kind == "resized_crop":
            x = augment(x, kind, *drawn)
        return x.numpy(), self.labels[i]


def batches(spec: Spec, dataset: Dataset | Streamed, seed: int) -> Batches:
    """Returns the examples to score on, (inputs as the network takes them, int32 labels).

    They are of the training part, without augmentation unless the spec wants it. Where examples
    have no classes they are as many as there would be, drawn at random.

    Args:
      spec: samples_per_class, score_batch_size, score_augmentation, scaling.
      dataset: where they come from.
      seed: of what is drawn.

    Raises:
      UserError: see `balanced`.
    """
    if isinstance(dataset, Streamed):
        inputs, labels = _first_of_each(spec, dataset, seed)
    else:
        inputs, labels = feeds.split(dataset, spec.validation_size, spec.seed)["train"]
    if labels.ndim == 1:
        chosen = balanced(labels, dataset.classes, spec.samples_per_class, seed)
    else:
        most = min(len(labels), dataset.classes * spec.samples_per_class)
        chosen = np.random.default_rng([seed, _SCORING]).permutation(len(labels))[:most]
    return Batches(inputs[chosen], labels[chosen], spec, dataset, seed)


def _first_of_each(
    spec: Spec, dataset: Streamed, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first samples_per_class examples of each class in the order of `feeds.walk`."""
    taken = np.zeros(dataset.classes, int)
    inputs, labels = [], []
    for some, kinds in feeds.walk(dataset, spec.validation_size, spec.score_batch_size, seed):
        for one, label in zip(some, kinds, strict=True):
            if taken[label] < spec.samples_per_class:
                taken[label] += 1
                inputs.append(one)
                labels.append(label)
        if (taken == spec.samples_per_class).all():
            break
    return np.stack(inputs), np.array(labels, np.int32)


def options(spec: Spec, seed: int) -> dict[str, Any]:
    """Returns the options that a spec gives its scorer: those of the scorer's signature.

    Args:
      spec: the experiment; 'auto' leaves an option to the scorer.
      seed: what it draws with, if it does.

    Raises:
      UserError: the spec has options that the scorer has not.
    """
    known, chosen = options_of(spec.scorer), dict(spec.scorer_options)
    for name, parameter in known.items():
        if name == "seed":
            chosen[name] = seed
        elif field := field_of(spec.scorer, name):
            value = getattr(spec, field)
            chosen[name] = parameter.default if value == "auto" else value
    if "loss" in chosen:
        chosen["loss"] = LOSSES[chosen["loss"]]
    if strange := [name for name in chosen if name not in known]:
        raise UserError(
            f"scorer {spec.scorer!r} has no option {strange[0]!r}; it has: "
            f"{', '.join(known) or 'none'}"
        )
    return chosen


def rounds(spec: Spec) -> int:
    """Returns in how many rounds a spec's scorer scores and prunes."""
    return spec.rounds or SCORERS.about(spec.scorer).rounds


def _require_warm(spec: Spec, chosen: Mapping[str, Any], model: Any) -> None:
    """Raises UserError where statistics are to be warmed up that nobody looks at."""
    if not spec.warm_batch_norm:
        return
    if not looks_at_data(spec.scorer):
        why = f"--scorer={spec.scorer} looks at no examples"
    elif chosen.get("batch_norm") == "train":
        why = "statistics of each batch are used for scoring; give --score_batch_norm=eval"
    elif not statistics.normalised(model):
        why = f"model {spec.model!r} has no batch normalisation"
    else:
        return
    raise UserError(f"warm_batch_norm has no effect: {why}")


def pick(
    dense: Ticket,
    dataset: Dataset | Streamed,
    density: Mapping[str, float],
    level: int,
    transform: Transform | None = None,
    model: Any = None,
) -> Ticket:
    """Returns the ticket that the spec's scorer picks out of a dense one.

    Args:
      dense: the level-0 ticket.
      dataset: where the examples to score on come from.
      density: kernel name -> fraction kept.
      level: its number.
      transform: applied to the scores, e.g. np.negative.
      model: the plain network with the ticket's weights (default: built anew).
    """
    spec, seed = dense.spec, dense.origin["seed"]
    if model is None:
        shape, classes = tuple(dense.origin["input_shape"]), dense.origin["classes"]
        model = plain_model(spec, shape, classes, seed)
    scoring: dict[str, Any] = {"rounds": rounds(spec)}
    chosen, data = options(spec, seed), None
    if looks_at_data(spec.scorer):
        data = batches(spec, dataset, seed)
        scoring |= {"samples": sum(map(len, data.labels)), "batch_size": len(data.labels[0])}
        if "batch_norm" in chosen:
            scoring["batch_norm"] = chosen["batch_norm"]
    _require_warm(spec, chosen, model)
    warm = statistics.anew(model, (x for x, _ in data or ()))
    with warm if spec.warm_batch_norm else contextlib.nullcontext():
        mask = one_shot_mask(
            model,
            spec.scorer,
            data,
            density=density,
            scope=spec.scope,
            rounds=spec.rounds,
            schedule=spec.round_schedule,
            min_per_layer=spec.min_per_layer,
            transform=transform,
            **chosen,
        )
    return dataclasses.replace(
        dense,
        mask=mask,
        weights=masks.apply(mask, dense.weights),
        level=level,
        origin={**dense.origin, "scoring": scoring},
    )
