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

from lth_tf import (
    analysis,
    branches,
    checkpoints,
    distribution,
    masks,
    models,
    picking,
    pruning,
    schedules,
    storage,
    trunk,
)
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
from lth_tf.training import Trained, Trainer, initial_weights

_TRAINED = "trained.safetensors"
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

    Every worker has one, and calls the same methods; the chief's reads and writes the files.

    Args:
      spec: the experiment.
      workdir: its folder.
      dataset: images and labels.
      strategy: the replicas to train on.
      asked: whether to stop, see `checkpoints.terminations`.
      trunk: another workdir, with the same dense network; see `trunk.take`.
    """

    def __init__(
        self,
        spec: Spec,
        workdir: Path,
        dataset: Dataset,
        strategy: Any = None,
        asked: checkpoints.Asked | None = None,
        trunk: Path | None = None,
    ):
        self.spec, self.workdir, self.trunk = spec, workdir, trunk
        self.asked = asked or checkpoints.Asked()
        self.progress: Any = None  # shown to the user; see `callbacks.progress.Progress`
        self.trainer = Trainer(spec, dataset, strategy)
        self.workers = self.trainer.workers
        self.plan = plan(spec, self.trainer.input_shape, self.trainer.classes)
        written = workdir / "summary.csv"
        self.summary: list[dict[str, Any]]
        _, self.summary = self.workers.share(
            lambda: ({}, read_csv(written) if written.exists() else [])
        )

    def say(self, text: str) -> None:
        """Tells the user something, once."""
        if self.progress:
            self.progress.say(text)
        elif self.workers.chief:
            warnings.warn(text, stacklevel=3)

    def write(self, do: Callable[[], Any]) -> None:
        """Has the chief write something; that it cannot is raised everywhere."""

        def done() -> tuple[dict, None]:
            do()
            return {}, None

        self.workers.share(done)

    def ticket(self, folder: Path, make: Callable[[], Ticket]) -> Ticket:
        """Returns the folder's ticket; makes and saves it where there is none."""
        path = folder / "ticket.safetensors"
        ticket = self._shared(lambda: self._own(path) if path.exists() else None)
        if ticket is None:
            made = make()
            self.write(lambda: made.save(path))
            ticket = self._shared(lambda: made)
        assert ticket is not None
        return ticket

    def _own(self, path: Path) -> Ticket:
        ticket = load_ticket(path)
        if ticket.spec.identity() != self.spec.identity():
            raise UserError(
                f"{str(path)!r} is a ticket of another experiment; choose another --workdir"
            )
        return ticket

    def _shared(self, get: Callable[[], Ticket | None]) -> Ticket | None:
        """What the chief gets, everywhere."""
        if self.workers.count == 1:
            return get()

        def told() -> tuple[dict, Any]:
            ticket = get()
            if ticket is None:
                return {}, None
            arrays = {f"mask/{name}": m for name, m in ticket.mask.items()}
            arrays |= {f"weights/{name}": w for name, w in ticket.weights.items()}
            names = list(ticket.mask), list(ticket.weights)
            return arrays, [*names, ticket.level, ticket.rewind_step, dict(ticket.origin)]

        arrays, about = self.workers.share(told)
        if about is None:
            return None
        kernels, names, level, step, origin = about
        mask = {name: arrays[f"mask/{name}"] for name in kernels}
        weights = {name: arrays[f"weights/{name}"] for name in names}
        return Ticket(mask, weights, level, step, origin, self.spec)

    def rewound(self, folder: Path) -> dict[str, np.ndarray]:
        """Returns the weights at the rewind step, which the training in `folder` has saved."""
        ticket = self._shared(lambda: load_ticket(folder / "rewind.safetensors"))
        assert ticket is not None
        return ticket.weights

    def train(self, folder: Path, ticket: Ticket, capture: int | None = None) -> dict:
        """Returns the weights that the ticket's training ended with; trains where needed.

        Writes checkpoints, TensorBoard logs, the weights at step `capture` as
        rewind.safetensors, metrics.csv, and last, as the mark that all is there,
        trained.safetensors. A training that was interrupted goes on from its last checkpoint.
        """
        replicate, arm = ticket.origin["replicate"], ticket.origin["arm"]
        what = f"replicate {replicate} level {ticket.level} {arm}"
        needed = ["metrics.csv", *(["rewind.safetensors"] if capture else []), _TRAINED]
        start = ticket.rewind_step
        stop = self.spec.train_steps if ticket.level == 0 else self.spec.retrain_span[1]
        weights, rows = self.workers.share(lambda: self._finished(folder, ticket, needed))
        if rows is not None:
            if self.progress:
                self.progress.skip(stop - start)
        else:
            try:
                trained = self._train(folder, ticket, start, stop, capture, what)
            except UserError as error:
                kept = "what is finished is kept"
                more = "" if kept in str(error) else f"; {kept}"
                raise type(error)(f"{what}: {error}{more}") from error
            weights, rows = trained.weights, trained.rows
            self.write(lambda: self._save(folder, ticket, trained))
        row = analysis.summary_row(arm, replicate, ticket.level, ticket.density, rows)
        key = arm, replicate, ticket.level
        others = [r for r in self.summary if (r["arm"], r["replicate"], r["level"]) != key]
        self.summary = [*others, row]
        self.write(lambda: analysis.write_summary(self.workdir, self.summary))
        if self.progress:
            self.progress.finish(what, row)
        return dict(weights)

    def _finished(
        self, folder: Path, ticket: Ticket, needed: list[str]
    ) -> tuple[dict, list[dict[str, Any]] | None]:
        """The weights and evaluations of a training that is finished, here or in the trunk."""
        if not all((folder / name).exists() for name in needed) and not (
            self.trunk and ticket.level == 0 and trunk.take(self.trunk, folder, ticket, needed)
        ):
            return {}, None
        return load_trained(folder / _TRAINED), read_csv(folder / "metrics.csv")

    def _train(
        self, folder: Path, ticket: Ticket, start: int, stop: int, capture: int | None, what: str
    ) -> Trained:
        point, logs = folder / "rewind.safetensors", folder / "tensorboard"

        def last() -> tuple[dict, Any]:
            found = checkpoints.latest(folder, self.say)
            if not found or (capture and found.step >= capture and not point.exists()):
                return {}, None
            return checkpoints.taken_apart(found)

        variables, about = self.workers.share(last)
        state = checkpoints.put_together(dict(variables), about) if about else None
        callbacks: list[Any] = []
        bytes_per_step = self.trainer.reduction.bytes(ticket.mask)
        if self.workers.chief:
            if state is None:
                shutil.rmtree(logs, ignore_errors=True)
            callbacks.append(
                Summaries(logs, histograms=self.spec.histograms, bytes_per_step=bytes_per_step)
            )
        if self.progress:
            if bytes_per_step:
                replicas = self.trainer.strategy.num_replicas_in_sync
                self.progress.say(
                    f"{what}: each of {replicas} replicas gives {bytes_per_step:,} bytes per step"
                )
            if state:
                self.progress.say(f"{what}: goes on at step {state.step:,} of {stop:,}")
                self.progress.skip(state.step - start)
            self.progress.begin(what, state.step if state else start)
            callbacks.append(self.progress)

        def captured(weights: dict) -> None:
            at = dataclasses.replace(ticket, weights=weights, rewind_step=capture or 0)
            self.write(lambda: at.save(point))

        with storage.explained(logs), os_errors(), self.asked.patiently():
            return self.trainer.train(
                ticket.weights,
                ticket.mask,
                start,
                stop,
                seed=ticket.origin["seed"],
                capture=capture,
                captured=captured,
                callbacks=callbacks,
                state=state,
                keep=lambda state: self.write(lambda: checkpoints.save(folder, state)),
                asked=self.asked,
            )

    @staticmethod
    def _save(folder: Path, ticket: Ticket, trained: Trained) -> None:
        write_csv(folder / "metrics.csv", METRICS, trained.rows)
        save_trained(folder / _TRAINED, trained.weights, ticket)
        checkpoints.clear(folder)

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
        with distribution.scoring(self.trainer.strategy):
            ticket = picking.pick(dense, self.trainer.dataset, self.plan.densities[level], level)
        model = models.build(self.spec, self.trainer.input_shape, self.trainer.classes, 0)
        found = analysis.collapse(ticket.mask, analysis.connected(model, ticket.mask))
        if self.progress or "warning" in found:
            self.say(found)
        return ticket

    def branches(self, folder: Path, ticket: Ticket, start: Mapping) -> None:
        """Trains the ticket's controls, each in a folder inside the ticket's."""
        for name in self.plan.controls.get(ticket.level, ()):
            here = folder / f"branch_{name}"
            with distribution.scoring(self.trainer.strategy):
                control = self.ticket(
                    here,
                    lambda: branch(ticket, name, start, self.trainer.dataset),  # noqa: B023
                )
            self.train(here, control)


@contextlib.contextmanager
def laboratory(
    spec: Spec,
    workdir: str | os.PathLike,
    dataset: Dataset,
    progress: Callable[[Plan], Any] | None,
    trunk: str | os.PathLike | None = None,
) -> Iterator[Laboratory]:
    """Within, the workdir is the spec's, locked; SIGTERM ends what is done at a checkpoint."""
    work, spec = Path(workdir), distribution.resolve(spec)
    strategy = distribution.strategy_of(spec)
    workers = distribution.workers_of(strategy)
    with distribution.lost(), contextlib.ExitStack() as stack:

        def own() -> tuple[dict, None]:
            stack.enter_context(storage.lock(work))
            require_own(work, spec)
            return {}, None

        workers.share(own)
        asked = stack.enter_context(checkpoints.terminations())
        lab = Laboratory(spec, work, dataset, strategy, asked, Path(trunk) if trunk else None)
        # Only now: what was refused so far must not be what the workdir asks for from now on.
        text = json.dumps(spec.as_dict(), indent=1, sort_keys=True) + "\n"
        lab.write(lambda: storage.write(work / "spec.json", text))
        if progress and workers.chief:
            lab.progress = stack.enter_context(progress(lab.plan))
            if (replicas := strategy.num_replicas_in_sync) > 1:
                lab.progress.say(
                    f"{replicas} replicas share each batch of {spec.batch_size}; XLA compiles "
                    "nothing then"
                )
        yield lab


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
    with laboratory(spec, workdir, dataset, progress, trunk) as lab:
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
    with laboratory(spec, workdir, dataset, progress, trunk) as lab:
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
        kept = "ticket.*" if found.recipe == "one_shot" else "checkpoint_*"
        begun = any(workdir.glob(f"replicate_*/**/{kept}"))
        if differing and not begun and next(finished(workdir), None) is None:
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
