"""Recipes: how an experiment goes from level to level, and resumes where it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from lth_tf.datasets import Dataset
from lth_tf.experiments.laboratory import opened
from lth_tf.experiments.plans import Plan
from lth_tf.spec import Spec


def imp(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
    *,
    trunk: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Iterative magnitude pruning with rewinding, in all replicates, with controls.

    Frankle and Carbin 2019, section 1: train, prune, rewind, again; `retrain` and
    `rewind_step` give the variants of Renda et al. 2020 and Frankle et al. 2020.
    Started again on the same workdir it goes on where it was.

    Args:
      spec: the experiment.
      workdir: folder for everything it writes.
      dataset: images and labels; see `datasets.load`.
      progress: given the plan, returns a `callbacks.progress.Progress`.
      trunk: another workdir, whose dense network is the same and is not trained again.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: see `Trainer` and `plan`; or the workdir belongs to
        another spec or process, cannot be written or holds a damaged file.
    """
    with opened(spec, workdir, dataset, progress, trunk) as lab:
        for replicate in range(spec.replicates):
            folder = lab.workdir / f"replicate_{replicate:02d}"
            here = folder / "level_00"
            initial = ticket = lab.ticket(here, lambda: lab.dense(replicate))  # noqa: B023
            k = spec.rewind_at
            trained = lab.train(here, ticket, capture=k or None)
            rewound = lab.rewound(here) if k else initial.weights
            for level in range(1, len(lab.plan.densities)):
                here = folder / f"level_{level:02d}"
                start = rewound if spec.retrain == "rewind" else trained
                ticket = lab.ticket(here, lambda: lab.prune(ticket, trained, start, level))  # noqa: B023
                trained = lab.train(here, ticket)
                lab.branches(here, ticket, start)
    return lab.summary


def one_shot(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
    *,
    score_only: bool = False,
    trunk: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Pruning before training: a ticket of each density, picked from the initial weights.

    Level i is the ticket of the i-th density, from the highest on; level 0, the dense
    network, is trained with `spec.dense` only. Resumes as `imp` does.

    Args:
      spec, workdir, dataset, progress, trunk: as for `imp`; the spec's recipe is 'one_shot'.
      score_only: write the tickets and stop.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: as `imp`; see also `scorers.one_shot_mask`.
    """
    with opened(spec, workdir, dataset, progress, trunk) as lab:
        for replicate in range(spec.replicates):
            folder, dense = lab.workdir / f"replicate_{replicate:02d}", lab.dense(replicate)
            if spec.dense and not score_only:
                lab.train(folder / "level_00", lab.ticket(folder / "level_00", lambda: dense))  # noqa: B023
            for level in range(1, len(lab.plan.densities)):
                here = folder / f"level_{level:02d}"
                ticket = lab.ticket(here, lambda: lab.pick(dense, level))  # noqa: B023
                if not score_only:
                    lab.train(here, ticket)
                    lab.branches(here, ticket, dense.weights)
    return lab.summary


RECIPES: dict[str, Callable[..., list[dict[str, Any]]]] = {"imp": imp, "one_shot": one_shot}
