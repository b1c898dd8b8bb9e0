"""Experiments: recipes that go from level to level and resume, since a file that exists is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import analysis, branches, masks, models, picking, pruning, schedules, storage
from lth_tf.analysis.summary import read_csv, write_csv
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
      rates: for imp kernel name -> fraction of its weights removed per level.
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
    """Returns what `imp` or `one_shot` would do.

    Raises:
      UserError: a density that cannot be reached, control levels that do not exist, or a
        control that such tickets cannot have.
    """
    model = models.build(spec, input_shape, classes, spec.seed)
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(model).items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    rates: dict[str, float] = {}
    if spec.recipe == "one_shot":
        densities = picking.densities(spec, sizes)
        if spec.min_per_layer or spec.scope != "global":  # whose budgets may not be possible
            blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
            for each in densities[1:]:
                SCOPES[spec.scope](blank, each, min_per_layer=spec.min_per_layer)
    else:
        rates = _rates(spec, pruning.kinds(model))
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
    for name in spec.controls:
        branches.require(name, spec)
    last = len(densities) - 1
    levels = spec.control_levels or range(1, last + 1)
    if bad := [level for level in levels if not 1 <= level <= last]:
        raise UserError(
            f"control_levels {bad} are out of range; controls run off pruned tickets, here "
            f"levels 1 to {last}"
        )
    controls = {level: spec.controls for level in levels if spec.controls}
    first, end = spec.retrain_span
    dense = spec.recipe == "imp" or spec.dense
    fresh = end if spec.retrain == "rewind" else end - first  # a control may have no past
    extra = sum(len(names) for names in controls.values())
    steps = dense * spec.train_steps + last * (end - first) + extra * fresh
    return Plan(
        shapes,
        rates,
        densities,
        controls,
        (dense + last + extra) * spec.replicates,
        steps * spec.replicates,
    )


def _rates(spec: Spec, kinds: Mapping[str, str]) -> dict[str, float]:
    """Kernel name -> fraction of its weights that a level removes."""
    own = {"conv": spec.prune_fraction_conv, "output": spec.prune_fraction_output, "dense": None}
    rates = {
        name: spec.prune_fraction if own[kind] is None else float(own[kind] or 0)
        for name, kind in kinds.items()
    } | dict.fromkeys(picking.protected(spec, kinds), 0.0)
    if spec.levels and not any(rates.values()):
        raise UserError("nothing would ever be pruned: every prune fraction is 0")
    return rates


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


    def pick(self, dense: Ticket, level: int) -> Ticket:
        """Returns the ticket that the spec's scorer picks; says what of the network is cut."""
        ticket = picking.pick(dense, self.trainer.dataset, self.plan.densities[level], level)
        model = models.build(self.spec, self.trainer.input_shape, self.trainer.classes, 0)
        found = analysis.collapse(ticket.mask, analysis.connected(model, ticket.mask))
        if self.progress:
            self.progress.say(found)
        elif "warning" in found:
            warnings.warn(found, stacklevel=2)
        return ticket

    def branches(self, folder: Path, ticket: Ticket, start: Mapping) -> None:
        """Trains the ticket's controls, each in a folder inside the ticket's."""
        for name in self.plan.controls.get(ticket.level, ()):
            here = folder / f"branch_{name}"
            self.train(
                here,
                self.ticket(here, lambda: branch(ticket, name, start, self.trainer.dataset)),  # noqa: B023
            )


@contextlib.contextmanager
def laboratory(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None,
) -> Iterator[Laboratory]:
    """Within, the workdir is the spec's, locked."""
    work = Path(workdir)
    with storage.lock(work):
        require_own(work, spec)
        lab = Laboratory(spec, work, dataset)
        # Only now: what was refused so far must not be what the workdir asks for from now on.
        storage.write(
            work / "spec.json", json.dumps(spec.as_dict(), indent=1, sort_keys=True) + "\n"
        )
        lab.progress = progress(lab.plan) if progress else None
        with lab.progress or contextlib.nullcontext():
            yield lab


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
    with laboratory(spec, workdir, dataset, progress) as lab:
        for replicate in range(spec.replicates):
            folder = lab.workdir / f"replicate_{replicate:02d}"
            here = folder / "level_00"
            initial = ticket = lab.ticket(here, lambda: lab.dense(replicate))  # noqa: B023
            k = spec.rewind_at
            trained = lab.train(here, ticket, capture=k or None)
            rewound = load_ticket(here / "rewind.safetensors").weights if k else initial.weights
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
) -> list[dict[str, Any]]:
    """Pruning before training: a ticket of each density, picked from the initial weights.

    Level i is the ticket of the i-th density, from the highest on; level 0, the dense
    network, is trained with `spec.dense` only. Resumes as `imp` does.

    Args:
      spec, workdir, dataset, progress: as for `imp`; the spec's recipe is 'one_shot'.
      score_only: write the tickets and stop.

    Returns:
      The rows of summary.csv.

    Raises:
      UserError: as `imp`; see also `scorers.one_shot_mask`.
    """
    with laboratory(spec, workdir, dataset, progress) as lab:
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


def branch(ticket: Ticket, name: str, start: Mapping, dataset: Dataset) -> Ticket:
    """Returns the control `name` of a ticket, marked as such; see `branches`."""
    control = branches.BRANCHES[name](ticket, start, dataset)
    return dataclasses.replace(control, origin={**control.origin, "arm": name})


def require_own(workdir: Path, spec: Spec) -> None:
    """Checks that `workdir` is the spec's, or nobody's; what was never finished is removed.

    Raises:
      UserError: the folder belongs to another spec; names the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        found = read_spec(workdir)
        mine, theirs = spec.identity(), found.identity()
        differing = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        picked = found.recipe == "one_shot" and any(workdir.glob("replicate_*/*/ticket.*"))
        if differing and not picked and next(finished(workdir), None) is None:
            # Whoever had it never finished anything: a first try with a mistake in it.
            for folder in workdir.glob("replicate_*"):
                shutil.rmtree(folder)
        elif differing:
            there, here = found.as_dict(), spec.as_dict()
            if found.recipe != spec.recipe:
                differing = ["recipe"]
            listed = "; ".join(f"{n} is {there[n]!r} there, {here[n]!r} here" for n in differing)
            raise UserError(
                f"{str(workdir)!r} belongs to another experiment: {listed}; choose another "
                "--workdir or the same values"
            )


def read_spec(workdir: Path) -> Spec:
    """Returns the spec of a workdir; raises UserError where there is none or it is damaged."""
    path = workdir / "spec.json"
    try:
        return Spec.from_dict(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(
            f"{str(workdir)!r} is not the workdir of an experiment: {error.strerror or error} "
            f"({path.name})"
        ) from error
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); delete it") from error


def finished(workdir: Path) -> Iterator[Path]:
    """Yields the folders of a workdir whose training is finished."""
    for path in sorted(Path(workdir).glob("replicate_*/level_*/**/trained.safetensors")):
        yield path.parent
