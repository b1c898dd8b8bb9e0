"""Running an experiment: every replicate goes through the steps of its recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

from lth_tf import datasets, distribute, edge, storage
from lth_tf.analysis import summary
from lth_tf.datasets import Dataset
from lth_tf.distribute.shares import slow_bfloat16
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.experiments.crew import Crew
from lth_tf.experiments.laboratory import Laboratory
from lth_tf.experiments.plans import Plan
from lth_tf.experiments.trunk import require as require_trunk
from lth_tf.experiments.workdirs import (
    note_execution,
    other_threads,
    require_own,
    settled,
    write_spec,
)
from lth_tf.models import Blueprint
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, require_spec
from lth_tf.training import checkpoints


@contextlib.contextmanager
def opened(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None,
    trunk: str | os.PathLike | None = None,
    trains: bool = True,
    blueprint: Blueprint | None = None,
    execution: Execution = Execution(),  # noqa: B008
) -> Iterator[Laboratory]:
    """Within, the workdir is the spec's, locked; SIGTERM ends what is done at a checkpoint.

    Args:
      spec, workdir, dataset, trunk, trains, blueprint: see `Laboratory`.
      progress: given the plan, returns a `callbacks.progress.Progress`.
      execution: what computes the trainings; see `workdirs.settled`.
    """
    work, spec = edge.folder(workdir), distribute.resolve(spec)
    strategy = distribute.strategy_of(spec)
    workers = distribute.workers_of(strategy)
    with distribute.lost(), contextlib.ExitStack() as stack:

        def own() -> tuple[dict, Any]:
            # First of all, so that nothing is changed where one of these is refused.
            if source and trains:
                require_trunk(source, spec, work)
            strange = ""
            if (work / "summary.csv").exists():
                strange = summary.contradicting(work, summary.written(work))
            stack.enter_context(storage.lock(work))
            require_own(work, spec)
            there = settled(work, execution)
            return {}, [strange, there.engine, there.compact]

        source = edge.folder(trunk) if trunk else None
        _, (strange, engine, compact) = workers.share(own)
        execution = dataclasses.replace(execution, engine=engine, compact=compact)
        asked = stack.enter_context(checkpoints.terminations())
        lab = Laboratory(
            spec, work, dataset, strategy, asked, source, trains, blueprint, execution
        )
        # Only now: what was refused so far must not be what the workdir asks for from now on.
        said: list[str] = []
        lab.write(lambda: said.append(note_execution(work, execution)))
        if source and trains:
            lab.write(lambda: said.append(other_threads(source)))
        lab.write(lambda: write_spec(work, spec))
        if progress and workers.chief:
            lab.progress = stack.enter_context(progress(lab.plan))
            if (replicas := strategy.num_replicas_in_sync) > 1:
                lab.progress.say(
                    f"{replicas} replicas share each batch of {spec.batch_size}; XLA compiles "
                    "nothing then"
                )
        if lab.progress and trains and (said_of := lab.trainer.engines.told()):
            lab.progress.say(said_of)
        if trains and (slow := slow_bfloat16(spec.precision)):
            lab.say(slow)
        if strange and trains:
            lab.say(f"summary.csv is made anew of each metrics.csv; it said otherwise: {strange}")
        for text in filter(None, said):
            lab.say(text)
        yield lab


def run(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
    *,
    score_only: bool = False,
    trunk: str | os.PathLike | None = None,
    blueprint: Blueprint | None = None,
    execution: Execution = Execution(),  # noqa: B008
    crew: Crew | None = None,
) -> list[dict[str, Any]]:
    """Does an experiment of any recipe. Started again on the same workdir it goes on.

    Args:
      spec: the experiment.
      workdir: folder for everything it writes.
      dataset: inputs and labels; see `datasets.load`.
      progress: given the plan, returns a `callbacks.progress.Progress`.
      score_only: write tickets and stop; for recipes that pick before training.
      trunk: another workdir, whose dense network is the same and is not trained again.
      blueprint: of the network, where the caller has looked at it.
      execution: what computes the trainings.
      crew: processes that train side by side; without one it is this process alone.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: see `Trainer`, `plan`, `Crew.lead` and `scorers.one_shot_mask`; or the workdir
        belongs to another spec or process, cannot be written or holds a damaged file.
    """
    _require(spec, dataset)
    recipe = RECIPES[spec.recipe]
    with opened(
        spec, workdir, dataset, progress, trunk, not score_only, blueprint, execution
    ) as lab:
        if crew:
            crew.lead(lab, dataset.name)
        else:
            for replicate in range(spec.replicates):
                recipe.steps(lab, replicate)
    return lab.summary


def imp(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
    *,
    trunk: str | os.PathLike | None = None,
    execution: Execution = Execution(),  # noqa: B008
) -> list[dict[str, Any]]:
    """Iterative magnitude pruning with rewinding, in all replicates, with controls.

    Frankle and Carbin 2019, section 1: train, prune, rewind, again; `retrain` and
    `rewind_step` give the variants of Renda et al. 2020 and Frankle et al. 2020.

    Args:
      spec: the experiment, of the recipe 'imp'.
      workdir, dataset, progress, trunk, execution: as for `run`.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: a spec of another recipe; or as `run`.
    """
    _require_recipe(spec, "imp")
    return run(spec, workdir, dataset, progress, trunk=trunk, execution=execution)


def one_shot(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
    *,
    score_only: bool = False,
    trunk: str | os.PathLike | None = None,
    execution: Execution = Execution(),  # noqa: B008
) -> list[dict[str, Any]]:
    """Pruning before training: a ticket of each density, picked from the initial weights.

    Level i is the ticket of the i-th density, from the highest on; level 0, the dense
    network, is trained with `spec.dense` only.

    Args:
      spec: the experiment, of the recipe 'one_shot'.
      workdir, dataset, progress, score_only, trunk, execution: as for `run`.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: a spec of another recipe; or as `run`.
    """
    _require_recipe(spec, "one_shot")
    return run(
        spec, workdir, dataset, progress, score_only=score_only, trunk=trunk, execution=execution
    )


def _require(spec: Any, *dataset: Any) -> None:
    """Raises UserError for what is no spec or no data set."""
    require_spec(spec)
    for each in dataset:
        datasets.require(each)


def _require_recipe(spec: Spec, recipe: str) -> None:
    _require(spec)
    if RECIPES[spec.recipe] is not RECIPES[recipe]:
        raise UserError(f"the spec's recipe is {spec.recipe!r}, not {recipe!r}; use run(spec, ...)")
