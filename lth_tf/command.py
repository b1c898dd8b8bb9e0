"""What the tools that run experiments share: plan, run, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import rich.console

from lth_tf import datasets, distribute, edge, experiments, models, report
from lth_tf.callbacks.progress import Progress
from lth_tf.errors import UserError
from lth_tf.models.small import matched
from lth_tf.spec import Spec


def run(
    spec: Spec,
    data_dir: str | None,
    workdir: str | None,
    *,
    plan_only: bool = False,
    jobs: str = "1",
    threads: int | None = None,
    **options: Any,
) -> None:
    """Prints what a spec asks for, does it, and prints what came out.

    Args:
      spec: the experiment.
      data_dir: folder of the data sets.
      workdir: folder for everything it writes (default: named after the spec, in runs/).
      plan_only: stop after the plan.
      jobs: how many processes train side by side, or 'auto'.
      threads: for each operation of a training; None: see `experiments.take_threads`.
      **options: the recipe's, e.g. score_only, trunk, small_dense.
    """
    console = rich.console.Console()
    if spec.distribute != "multi_worker" or plan_only:
        # Also first of all: a process that has computed something cannot be forked.
        number = 1 if plan_only else experiments.jobs_of(jobs, spec)
        crew = experiments.Crew(number, data_dir) if number > 1 else None
        with crew or contextlib.nullcontext():
            _run(console, spec, data_dir, workdir, plan_only, {**options, "crew": crew}, threads)
        return
    if jobs not in ("1", "auto") or threads:
        raise UserError("--jobs and --threads are for one machine, not for distribute=multi_worker")
    # First of all, for nothing may be computed before a process joins its cluster.
    workers = distribute.workers_of(distribute.join(spec))
    console.quiet = not workers.chief
    try:
        with distribute.lost():
            _run(console, spec, data_dir, workdir, plan_only, options, None, workers)
    except BaseException as error:
        if (said := edge.told(error)) is None:
            raise
        print(said[0], file=sys.stderr, flush=True)
        # TensorFlow would wait for the others at its exit, and they for this one.
        os._exit(said[1])


def _folder(spec: Spec) -> Path:
    """The workdir that a spec has by default."""
    return Path(f"runs/{spec.dataset}_{spec.model}_{spec.digest()}")


def _run(
    console: rich.console.Console,
    spec: Spec,
    data_dir: str | None,
    workdir: str | None,
    plan_only: bool,
    options: dict[str, Any],
    threads: int | None,
    workers: distribute.Workers | None = None,
) -> None:
    options, work = dict(options), None if workdir is None else edge.folder(workdir)
    if options.get("trunk") is not None:
        options = {**options, "trunk": edge.folder(options["trunk"])}
    if not plan_only:
        # Both before anything is computed, threads even before devices are looked at.
        if workers is None:
            one = dataclasses.replace(spec, distribute="none", devices=None)
            likely = work or _folder(one if spec.distribute == "auto" else spec)
            crew = options["crew"]
            experiments.take_threads(likely, threads, crew and crew.share)
        spec = distribute.resolve(spec)
        work = work or _folder(spec)

    small = options.pop("small_dense", None)
    if small is not None and workdir is None:
        raise UserError("small_dense needs --workdir: the network's name is not known before")

    @functools.cache
    def load() -> Any:
        return datasets.load(spec.dataset, data_dir)

    if workers:
        workers.share(lambda: ({}, bool(load())))  # the chief alone prepares what is not there yet
        data = workers.agree(load)
    else:
        data = load()
    if small is not None:
        none: dict[str, Any] = {"levels": 0, "target_density": None, "controls": ()}
        spec = dataclasses.replace(spec, **none, control_levels=())
        spec = matched(spec, data.input_shape, data.classes, small)
    blueprint = models.Blueprint(spec, data.input_shape, data.classes)
    models.require_fit(spec, blueprint.plain, data)
    planned = experiments.plan(spec, data.input_shape, data.classes, blueprint)
    for part in report.plan_tables(planned, spec, options.get("score_only", False)):
        console.print(part, highlight=False)
    if plan_only:
        return
    assert work is not None
    rows = experiments.run(
        spec, work, data, lambda p: Progress(console, p.steps), blueprint=blueprint, **options
    )
    if workers is None or workers.chief:
        report.finish(console, rows, work, spec)
