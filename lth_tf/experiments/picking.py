"""Tickets picked before training, as a spec asks for: scoring examples, options, mask."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import masks
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.models import plain_model
from lth_tf.scopes import count
from lth_tf.scorers import LOSSES, ROUNDS, one_shot_mask
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import feeds

Transform = Callable[[np.ndarray], np.ndarray]

_SCORING = 3  # a stream of random numbers; 1 and 2 are those of `feeds`


def protected(spec: Spec, names: Iterable[str]) -> list[str]:
    """Returns which kernels `spec.protect` keeps out of pruning.

    Raises:
      UserError: an entry fits no kernel.
    """
    names = list(names)
    for pattern in spec.protect:
        if not fnmatch.filter(names, pattern):
            raise UserError(
                f"protect {pattern!r} fits no kernel; the kernels are {', '.join(names)}"
            )
    return [n for n in names if any(fnmatch.fnmatchcase(n, p) for p in spec.protect)]


def balanced(labels: np.ndarray, classes: int, per_class: int, seed: int) -> np.ndarray:
    """Returns which examples to score on, int[classes * per_class]: as many of each class.

    One of each class, then another of each, so that every stretch is nearly balanced.

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

    Args:
      images: uint8 [n, h, w, c].
      labels: int32 [n].
      spec: score_batch_size and scaling.
      dataset: mean and standard deviation.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, spec: Spec, dataset: Any):
        count = -(-len(labels) // spec.score_batch_size)
        self.images, self.labels = np.array_split(images, count), np.array_split(labels, count)
        self.spec, self.dataset = spec, dataset

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: Any) -> Any:
        x = feeds.scaled(self.images[i], self.dataset, self.spec)
        return x.numpy(), self.labels[i]


def batches(spec: Spec, dataset: Dataset | Streamed, seed: int) -> Batches:
    """Returns the examples to score on, (images as the network takes them, int32 labels).

    They are of the training part, without augmentation.
    """
    if isinstance(dataset, Streamed):
        images, labels = _first_of_each(spec, dataset, seed)
    else:
        images, labels = feeds.split(dataset, spec.validation_size, spec.seed)["train"]
    chosen = balanced(labels, dataset.classes, spec.samples_per_class, seed)
    return Batches(images[chosen], labels[chosen], spec, dataset)


def _first_of_each(
    spec: Spec, dataset: Streamed, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first samples_per_class examples of each class in the order of `feeds.walk`."""
    taken = np.zeros(dataset.classes, int)
    images, labels = [], []
    for some, kinds in feeds.walk(dataset, spec.validation_size, spec.score_batch_size, seed):
        for image, label in zip(some, kinds, strict=True):
            if taken[label] < spec.samples_per_class:
                taken[label] += 1
                images.append(image)
                labels.append(label)
        if (taken == spec.samples_per_class).all():
            break
    return np.stack(images), np.array(labels, np.int32)


def options(spec: Spec, seed: int) -> dict[str, Any]:
    """Returns the options that a spec gives its scorer."""
    chosen: dict[str, Any] = {"seed": seed} if spec.scorer in ("random", "grasp", "snip") else {}
    if spec.scorer in ("grasp", "snip"):
        auto = {"grasp": "train", "snip": "eval"}[spec.scorer]
        chosen["batch_norm"] = auto if spec.score_batch_norm == "auto" else spec.score_batch_norm
        chosen["variant"] = getattr(spec, f"{spec.scorer}_variant")
        chosen["loss"] = LOSSES[spec.score_loss]
    if spec.scorer == "grasp":
        chosen["temperature"] = spec.temperature
    return chosen


def densities(spec: Spec, sizes: Mapping[str, int]) -> list[dict[str, float]]:
    """Returns for every level, 0 included, the density of every kernel.

    Args:
      spec: the experiment; its densities are those of the network as a whole.
      sizes: kernel name -> number of weights. Protected kernels are kept whole, the others
        share what is left.

    Raises:
      UserError: a density keeps no weight, or fewer than the protected kernels have.
    """
    kept = protected(spec, sizes)
    total, fixed = sum(sizes.values()), sum(sizes[name] for name in kept)
    if fixed == total:
        raise UserError(f"protect {','.join(spec.protect)!r} leaves nothing that could be pruned")
    found = [dict.fromkeys(sizes, 1.0)]
    for density in spec.density:
        rest = count(density, total) - fixed
        if rest <= 0:
            what = f"the {fixed} of the protected kernels" if fixed else "nothing"
            raise UserError(
                f"density {density:g} of {total} weights leaves {what}; ask for "
                f"{math.ceil((fixed + 1) / total * 1e6) / 1e6:g} or more"
            )
        share = density if not fixed else rest / (total - fixed)
        found.append({name: 1.0 if name in kept else share for name in sizes})
    return found


def pick(
    dense: Ticket,
    dataset: Dataset | Streamed,
    density: Mapping[str, float],
    level: int,
    transform: Transform | None = None,
) -> Ticket:
    """Returns the ticket that the spec's scorer picks out of a dense one.

    Args:
      dense: the level-0 ticket.
      dataset: where the examples to score on come from.
      density: kernel name -> fraction kept.
      level: its number.
      transform: applied to the scores, e.g. np.negative.
    """
    spec, seed = dense.spec, dense.origin["seed"]
    shape, classes = tuple(dense.origin["input_shape"]), dense.origin["classes"]
    scoring: dict[str, Any] = {"rounds": spec.rounds or ROUNDS.get(spec.scorer, 1)}
    data = None
    if spec.scorer in ("grasp", "snip"):
        data = batches(spec, dataset, seed)
        scoring |= {
            "samples": sum(map(len, data.labels)),
            "batch_size": len(data.labels[0]),
            "batch_norm": options(spec, seed)["batch_norm"],
        }
    mask = one_shot_mask(
        plain_model(spec, shape, classes, seed),
        spec.scorer,
        data,
        density=density,
        scope=spec.scope,
        rounds=spec.rounds,
        schedule=spec.round_schedule,
        min_per_layer=spec.min_per_layer,
        transform=transform,
        **options(spec, seed),
    )
    return dataclasses.replace(
        dense,
        mask=mask,
        weights=masks.apply(mask, dense.weights),
        level=level,
        origin={**dense.origin, "scoring": scoring},
    )
