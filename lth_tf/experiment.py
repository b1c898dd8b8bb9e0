"""Experiments: recipes that go from level to level and resume, since a file that exists is done."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lth_tf import analysis, masks, models, pruning, schedules, storage
from lth_tf.analysis.summary import read_csv, write_csv
from lth_tf.branches import BRANCHES
from lth_tf.callbacks import Summaries
from lth_tf.compat import os_errors
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.scopes import SCOPES, count
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket, load_ticket, load_trained, save_trained
from lth_tf.training import Trainer, initial_weights

METRICS = (
    "step",
    "loss",
    "validation_loss",
    "validation_accuracy",
    "test_loss",
    "test_accuracy",
    "learning_rate",
    "seconds",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What an experiment will do.

    Attributes:
      shapes: kernel name -> shape.
      rates: kernel name -> fraction of its weights removed per level.
      densities: for each level, kernel name -> density.
      controls: level -> names of the branches run there.
      trainings: their number over all replicates, controls included.
      steps: their training steps in total.
    """

    shapes: dict[str, tuple[int, ...]]
    rates: dict[str, float]
    densities: list[dict[str, float]]
    controls: dict[int, tuple[str, ...]]
    trainings: int
    steps: int

    def kept(self, level: int) -> dict[str, int]:
        """Returns how many weights of each kernel a level keeps under layerwise pruning."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()}
        return {name: count(d, sizes[name]) for name, d in self.densities[level].items()}


def plan(spec: Spec, input_shape: tuple[int, ...], classes: int) -> Plan:
    """Returns what `imp` would do.

    Raises:
      UserError: a target that cannot be reached, or control levels that do not exist.
    """
    model = models.build(spec, input_shape, classes, spec.seed)
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(model).items()}
    own = {"conv": spec.prune_fraction_conv, "output": spec.prune_fraction_output, "dense": None}
    rates = {
        name: spec.prune_fraction if own[kind] is None else float(own[kind] or 0)
        for name, kind in pruning.kinds(model).items()
    }
    rates |= dict.fromkeys(protected(spec, shapes), 0.0)
    densities = schedules.level_densities(
        {name: math.prod(shape) for name, shape in shapes.items()},
        rates,
        levels=spec.levels if spec.target_density is None else None,
        target_density=spec.target_density,
        one_shot=spec.one_shot,
    )
    if len(densities) > 1 and not any(rates.values()):
        raise UserError("nothing would ever be pruned: every prune fraction is 0")
    last = len(densities) - 1
    if empty := [n for n, d in densities[last].items() if not count(d, math.prod(shapes[n]))]:
        raise UserError(
            f"nothing would be left of {', '.join(empty)} at the last level, which would cut the "
            "network; ask for fewer levels or a higher density"
        )
    levels = spec.control_levels or range(1, last + 1)
    if bad := [level for level in levels if not 1 <= level <= last]:
        raise UserError(
            f"control_levels {bad} are out of range; controls run off pruned tickets, here "
            f"levels 1 to {last}"
        )
    controls = {level: spec.controls for level in levels if spec.controls}
    first, end = spec.retrain_span
    steps = spec.train_steps + last * (end - first)
    fresh = end if spec.retrain == "rewind" else end - first  # a control has no past
    steps += sum(len(names) for names in controls.values()) * fresh
    trainings = len(densities) + sum(len(names) for names in controls.values())
    return Plan(
        shapes, rates, densities, controls, trainings * spec.replicates, steps * spec.replicates
    )


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


class Laboratory:
    """One workdir: trains tickets in folders, or reads what was trained there before.

    Args:
      spec: the experiment.
      workdir: its folder.
      dataset: images and labels.
      progress: shown to the user; see `callbacks.progress.Progress`.
    """

    def __init__(self, spec: Spec, workdir: Path, dataset: Dataset, progress: Any = None):
        self.spec, self.workdir, self.progress = spec, workdir, progress
        self.trainer = Trainer(spec, dataset)
        self.plan = plan(spec, self.trainer.input_shape, self.trainer.classes)
        written = workdir / "summary.csv"
        self.summary: list[dict[str, Any]] = read_csv(written) if written.exists() else []

    def ticket(self, folder: Path, make: Callable[[], Ticket]) -> Ticket:
        """Returns the folder's ticket; makes and saves it where there is none."""
        path = folder / "ticket.safetensors"
        if path.exists():
            ticket = load_ticket(path)
            if ticket.spec.identity() != self.spec.identity():
                raise UserError(
                    f"{str(path)!r} is a ticket of another experiment; choose another --workdir"
                )
            return ticket
        ticket = make()
        ticket.save(path)
        return ticket

    def train(self, folder: Path, ticket: Ticket, capture: int | None = None) -> dict:
        """Returns the weights that the ticket's training ended with; trains where needed.

        Writes metrics.csv, TensorBoard logs, the weights at step `capture` as
        rewind.safetensors, and last, as the mark that all is there, trained.safetensors.
        """
        replicate, arm = ticket.origin["replicate"], ticket.origin["arm"]
        what = f"replicate {replicate} level {ticket.level} {arm}"
        path, metrics = folder / "trained.safetensors", folder / "metrics.csv"
        needed = [path, metrics, *([folder / "rewind.safetensors"] if capture else [])]
        start = ticket.rewind_step
        stop = self.spec.train_steps if ticket.level == 0 else self.spec.retrain_span[1]
        if all(file.exists() for file in needed):
            weights, rows = load_trained(path), read_csv(metrics)
            if self.progress:
                self.progress.skip(stop - start)
        else:
            logs = folder / "tensorboard"
            shutil.rmtree(logs, ignore_errors=True)
            callbacks = [Summaries(logs, histograms=self.spec.histograms)]
            if self.progress:
                self.progress.begin(what, start)
                callbacks.append(self.progress)
            try:
                with storage.explained(logs), os_errors():
                    trained = self.trainer.train(
                        ticket.weights,
                        ticket.mask,
                        start,
                        stop,
                        seed=ticket.origin["seed"],
                        capture=capture,
                        callbacks=callbacks,
                    )
            except UserError as error:
                raise type(error)(f"{what}: {error}; what is finished is kept") from error
            weights, rows = trained.weights, trained.rows
            if trained.captured is not None:
                point = dataclasses.replace(
                    ticket, weights=trained.captured, rewind_step=capture or 0
                )
                point.save(folder / "rewind.safetensors")
            write_csv(metrics, METRICS, rows)
            save_trained(path, weights, ticket)
        row = analysis.summary_row(arm, replicate, ticket.level, ticket.density, rows)
        key = arm, replicate, ticket.level
        others = [r for r in self.summary if (r["arm"], r["replicate"], r["level"]) != key]
        self.summary = [*others, row]
        analysis.write_summary(self.workdir, self.summary)
        if self.progress:
            self.progress.finish(what, row)
        return weights

    def dense(self, replicate: int) -> Ticket:
        """Returns the level-0 ticket: nothing pruned, weights as initialised."""
        spec, seed = self.spec, self.spec.seed + replicate
        weights, kernels = initial_weights(
            spec, self.trainer.input_shape, self.trainer.classes, seed
        )
        origin = {
            "seed": seed,
            "replicate": replicate,
            "arm": "ticket",
            "input_shape": list(self.trainer.input_shape),
            "classes": self.trainer.classes,
            "dataset": spec.dataset,
            "initial_sha256": storage.digest(weights),
        }
        mask = masks.ones({name: weights[name].shape for name in kernels})
        return Ticket(mask, weights, 0, 0, origin, spec)

    def prune(self, ticket: Ticket, trained: Mapping, start: Mapping, level: int) -> Ticket:
        """Returns the next level's ticket: magnitudes of `trained`, weights from `start`."""
        kernels = {name: trained[name] for name in ticket.mask}
        scores = SCORERS["magnitude"](None, kernels, None)
        mask: Mask = SCOPES[self.spec.scope](
            scores, self.plan.densities[level], within=ticket.mask
        )
        return dataclasses.replace(
            ticket,
            mask=mask,
            weights=masks.apply(mask, start),
            level=level,
            rewind_step=self.spec.retrain_span[0],
        )


def imp(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None = None,
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

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: see `Trainer` and `plan`; or the workdir belongs to
        another spec or process, cannot be written or holds a damaged file.
    """
    work = Path(workdir)
    with storage.lock(work):
        claim(work, spec)
        lab = Laboratory(spec, work, dataset)
        lab.progress = progress(lab.plan) if progress else None
        with lab.progress or contextlib.nullcontext():
            for replicate in range(spec.replicates):
                _one_replicate(lab, replicate)
    return lab.summary


def _one_replicate(lab: Laboratory, replicate: int) -> None:
    spec, folder = lab.spec, lab.workdir / f"replicate_{replicate:02d}"
    here = folder / "level_00"
    initial = ticket = lab.ticket(here, lambda: lab.dense(replicate))
    k = spec.rewind_at
    trained = lab.train(here, ticket, capture=k or None)
    rewound = load_ticket(here / "rewind.safetensors").weights if k else initial.weights
    for level in range(1, len(lab.plan.densities)):
        here = folder / f"level_{level:02d}"
        start = rewound if spec.retrain == "rewind" else trained
        ticket = lab.ticket(here, lambda: lab.prune(ticket, trained, start, level))  # noqa: B023
        trained = lab.train(here, ticket)
        for name in lab.plan.controls.get(level, ()):
            control = lab.ticket(here / f"branch_{name}", lambda: branch(ticket, name))  # noqa: B023
            lab.train(here / f"branch_{name}", control)


def branch(ticket: Ticket, name: str) -> Ticket:
    """Returns the control `name` of a ticket, marked as such."""
    control = BRANCHES[name](ticket)
    return dataclasses.replace(control, origin={**control.origin, "arm": name})


def claim(workdir: Path, spec: Spec) -> None:
    """Makes `workdir` the spec's, or checks that it is.

    Raises:
      UserError: the folder belongs to another spec; names the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        try:
            found = Spec.from_dict(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{str(path)!r} cannot be read ({error}); delete it") from error
        mine, theirs = spec.identity(), found.identity()
        differing = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if differing and next(finished(workdir), None) is None:
            # Whoever had it never finished a training: a first try with a mistake in it.
            for folder in workdir.glob("replicate_*"):
                shutil.rmtree(folder)
        elif differing:
            there, here = found.as_dict(), spec.as_dict()
            listed = "; ".join(f"{n} is {there[n]!r} there, {here[n]!r} here" for n in differing)
            raise UserError(
                f"{str(workdir)!r} belongs to another experiment: {listed}; choose another "
                "--workdir or the same values"
            )
    storage.write(path, json.dumps(spec.as_dict(), indent=1, sort_keys=True) + "\n")


def finished(workdir: Path) -> Iterator[Path]:
    """Yields the folders of a workdir whose training is finished."""
    for path in sorted(Path(workdir).glob("replicate_*/level_*/**/trained.safetensors")):
        yield path.parent
