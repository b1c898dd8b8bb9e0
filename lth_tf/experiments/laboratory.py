"""The laboratory: one workdir in which tickets are made and trained, or read where they are."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import analysis, datasets, distribute, masks, models, pruning, storage
from lth_tf.analysis import flops, summary
from lth_tf.callbacks import Summaries, summaries
from lth_tf.compat import os_errors
from lth_tf.datasets import Dataset
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.experiments import growing, measured, picking, trunk
from lth_tf.experiments.branches import branch
from lth_tf.experiments.plans import plan
from lth_tf.experiments.spectrum import Spectrum
from lth_tf.experiments.workdirs import read_training
from lth_tf.masks import Mask
from lth_tf.recipes import RECIPES
from lth_tf.scopes import SCOPES
from lth_tf.scorers import SCORERS, TiedScores, ties
from lth_tf.spec import Spec, require_spec
from lth_tf.tickets import Ticket, load_ticket, save_trained
from lth_tf.training import State, Trained, Trainer, checkpoints

TRAINED = "trained.safetensors"


class Laboratory:
    """One workdir: trains tickets in folders, or reads what was trained there before.

    Every worker has one, and calls the same methods; the chief's reads and writes the files.

    Args:
      spec: the experiment.
      workdir: its folder.
      dataset: inputs and labels.
      strategy: the replicas to train on.
      asked: whether to stop, see `checkpoints.terminations`.
      trunk: another workdir, with the same dense network; see `trunk.take`.
      trains: whether tickets are to be trained, or only made.
      blueprint: of the network, where others look at it, too.
      execution: what computes the trainings.

    Attributes:
      spec, workdir, trains: as given.
      plan: what is going to be done.
      trainer, workers: who trains, and the processes that do.
      execution: as given.
      progress: shown to the user; see `callbacks.progress.Progress`.
      leader: called with what the process that leads this one is to know, if one does; see `crew`.
      summary: the rows of summary.csv.
    """

    def __init__(
        self,
        spec: Spec,
        workdir: Path,
        dataset: Dataset,
        strategy: Any = None,
        asked: checkpoints.Asked | None = None,
        trunk: Path | None = None,
        trains: bool = True,
        blueprint: models.Blueprint | None = None,
        execution: Execution = Execution(),  # noqa: B008
    ):
        require_spec(spec)
        datasets.require(dataset)
        self.spec, self.workdir, self.trunk, self.trains = spec, workdir, trunk, trains
        self.asked = asked or checkpoints.Asked()
        self.progress: Any = None
        self.leader: Callable[..., None] | None = None
        self.execution = execution
        self.blueprint = blueprint or models.Blueprint(spec, dataset.input_shape, dataset.classes)
        self.plan = plan(spec, dataset.input_shape, dataset.classes, self.blueprint)
        self.trainer = Trainer(spec, dataset, strategy, self.blueprint, execution)
        self.workers = self.trainer.workers
        # Not read of summary.csv, in which anybody may have written.
        self.summary: list[dict[str, Any]]
        _, self.summary = self.workers.share(lambda: ({}, summary.rebuilt(workdir)))

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

    @property
    def levels(self) -> range:
        """The levels at which something is pruned."""
        return range(1, len(self.plan.densities))

    def folder(self, replicate: int) -> Path:
        """Returns where a replicate lies."""
        return self.workdir / f"replicate_{replicate:02d}"

    def ticket(self, folder: Path, make: Callable[..., Ticket], *given: Any) -> Ticket:
        """Returns the folder's ticket; saves what `make` makes of the rest where there is none."""
        path = folder / "ticket.safetensors"
        ticket = self._shared(lambda: self._own(path) if path.exists() else None)
        if ticket is None:
            made = make(*given)
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
        network = pruning.weights(self.trainer.model)
        if {n: w.shape for n, w in ticket.weights.items()} != {
            n: tuple(v.shape) for n, v in network.items()
        } or ticket.mask.keys() != pruning.kernels(self.trainer.model).keys():
            raise storage.OtherFile(
                f"{str(path)!r} is a ticket of another network; delete it and run the same command "
                "again to make it anew"
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
        ticket = self._shared(lambda: self._own(folder / "rewind.safetensors"))
        assert ticket is not None
        return ticket.weights

    def train(self, folder: Path, ticket: Ticket, capture: int | None = None) -> dict:
        """Returns the weights that the ticket's training ended with; trains where needed.

        Writes checkpoints, TensorBoard logs, the weights at step `capture` as
        rewind.safetensors, metrics.csv, and last, as the mark that all is there,
        trained.safetensors. A training that was interrupted goes on from its last checkpoint.

        Args:
          folder: where they are written.
          ticket: what is trained.
          capture: a step, or None.

        Raises:
          UserError: see `Trainer.train`; or a file cannot be written.
        """
        replicate, arm = ticket.origin["replicate"], ticket.origin["arm"]
        what = f"replicate {replicate} level {ticket.level} {arm}"
        needed = ["metrics.csv", *(["rewind.safetensors"] if capture else []), TRAINED]
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
                finished = "what is finished is kept"
                more = "" if finished in str(error) else f"; {finished}"
                raise type(error)(f"{what}: {error}{more}") from error
            weights, rows = trained.weights, trained.rows
            self.write(lambda: self._save(folder, ticket, trained))
        _, (density, counted) = self.workers.share(lambda: ({}, self._about(folder, ticket)))
        settled = RECIPES[self.spec.recipe].settled(self.spec) if ticket.level else 0
        key = arm, replicate, ticket.level
        found = analysis.summary_row(*key, density, rows, settled, counted)
        self.note(what, found)
        return dict(weights)

    def _about(self, folder: Path, ticket: Ticket) -> tuple[float, dict[str, float]]:
        """The density that a finished training ended with, and its FLOPs."""
        about = storage.read_about(folder / TRAINED)
        return float(about.get("density", ticket.density)), summary.flops_of(about)

    def _moves(self, ticket: Ticket) -> bool:
        """Whether a ticket's mask moves in its training."""
        return ticket.level > 0 and RECIPES[self.spec.recipe].moves(self.spec)

    def later(self, folder: Path, ticket: Ticket) -> None:
        """Trains a ticket for whose weights nothing waits, at once or in another process.

        Args:
          folder: where the ticket is.
          ticket: what is trained.

        Raises:
          UserError: see `train`.
        """
        if self.leader:
            self.leader("later", folder)
        else:
            self.train(folder, ticket)

    def note(self, what: str, row: dict[str, Any]) -> None:
        """Writes the summary of a training into summary.csv, and shows it.

        Args:
          what: which training it was.
          row: its summary.
        """
        if self.leader:
            self.leader("note", what, row)
            return
        key = row["arm"], row["replicate"], row["level"]
        others = [r for r in self.summary if (r["arm"], r["replicate"], r["level"]) != key]
        self.summary = [*others, row]
        self.write(lambda: analysis.write_summary(self.workdir, self.summary))
        if self.progress:
            self.progress.finish(what, row)

    def _finished(
        self, folder: Path, ticket: Ticket, needed: list[str]
    ) -> tuple[dict, list[dict[str, Any]] | None]:
        """The weights and evaluations of a training that is finished, here or in the trunk."""
        if not all((folder / name).exists() for name in needed) and not (
            self.trunk and ticket.level == 0 and trunk.take(self.trunk, folder, ticket, needed)
        ):
            return {}, None
        weights, rows = read_training(folder, ticket)
        self._log_again(folder, ticket, rows)
        return weights, rows

    def _log_again(self, folder: Path, ticket: Ticket, rows: list[dict[str, Any]]) -> None:
        """Writes the TensorBoard logs of a finished training where somebody deleted them."""
        logs = folder / "tensorboard"
        if any(logs.glob("events.*")):
            return
        self._log(logs, ticket, rows)
        what = f"replicate {ticket.origin['replicate']} level {ticket.level} {ticket.origin['arm']}"
        lost = "; histograms are lost" if self.spec.histograms else ""
        self.say(f"{what}: its TensorBoard logs were gone: made anew of metrics.csv{lost}")

    def _log(self, logs: Path, ticket: Ticket, rows: list[dict[str, Any]]) -> None:
        """Writes TensorBoard logs of evaluations, the first one before the first step or known."""
        with storage.explained(logs), os_errors():
            bytes_per_step = self.trainer.reduction.bytes(ticket.mask)
            summaries.write(
                logs, ticket.mask, rows, bytes_per_step=bytes_per_step,
                more=measured.logged(logs.parent, rows[0]["step"], rows[-1]["step"]),
            )  # fmt: skip

    def _train(
        self, folder: Path, ticket: Ticket, start: int, stop: int, capture: int | None, what: str
    ) -> Trained:
        point, logs = folder / "rewind.safetensors", folder / "tensorboard"

        def last() -> tuple[dict, Any]:
            found = checkpoints.latest(folder, self.say, ticket, stop)
            if not found or (capture and found.step >= capture and not point.exists()):
                return {}, None
            return checkpoints.taken_apart(found)

        mover = growing.mover(ticket, self.blueprint) if self._moves(ticket) else None
        variables, about = self.workers.share(last)
        state = checkpoints.put_together(dict(variables), about) if about else None
        callbacks: list[Any] = []
        bytes_per_step = self.trainer.reduction.bytes(ticket.mask)
        if self.workers.chief and state is None:
            shutil.rmtree(logs, ignore_errors=True)
            measured.clear(folder)
        live = self.spec.histograms or self.execution.live
        if self.workers.chief and live:
            callbacks.append(
                Summaries(logs, histograms=self.spec.histograms, bytes_per_step=bytes_per_step)
            )
        if self.spec.hessian_at:
            callbacks.append(
                Spectrum(
                    folder / measured.HESSIAN, ticket, self.trainer.dataset, self.blueprint,
                    self.trainer.strategy, self.spec.hessian_at,
                )
            )  # fmt: skip
        logged = len(state.rows) - 1 if state else 0
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

        def keep(state: State) -> None:
            nonlocal logged
            self.write(lambda: checkpoints.save(folder, state, ticket))
            if mover:
                self.write(lambda: measured.write_updates(folder, mover.updates))
            if not live and len(state.rows) - 1 > logged:
                self.write(lambda: self._log(logs, ticket, list(state.rows[logged:])))
                logged = len(state.rows) - 1

        with storage.explained(logs), os_errors(), self.asked.patiently():
            trained = self.trainer.train(
                ticket.weights,
                ticket.mask,
                start,
                stop,
                seed=ticket.origin.get("order_seed", ticket.origin["seed"]),
                capture=capture,
                captured=captured,
                callbacks=callbacks,
                mover=mover,
                state=state,
                keep=keep,
                asked=self.asked,
            )
        if trained.updates:
            self.write(lambda: measured.write_updates(folder, trained.updates))
        if live and (more := measured.logged(folder, start, stop)):
            self.write(lambda: summaries.add(logs, more))
        if not live:  # all in one file, whatever a training that was interrupted has left
            self.write(lambda: shutil.rmtree(logs, ignore_errors=True))
            self.write(lambda: self._log(logs, ticket, trained.rows))
        return trained

    def _save(self, folder: Path, ticket: Ticket, trained: Trained) -> None:
        metric = self.trainer.task.metric
        digest = summary.write_metrics(folder / "metrics.csv", metric, trained.rows)
        other = trained.decision != Decision()
        decision = trained.decision.told() if other else None
        moved = trained.mask if self._moves(ticket) else None
        steps = trained.rows[-1]["step"] - trained.rows[0]["step"]
        told = flops.of_training(
            self.blueprint.plain, self.spec, ticket.level, ticket.mask, trained.mask, steps
        )
        save_trained(folder / TRAINED, trained.weights, ticket, digest, decision, moved, told)
        checkpoints.clear(folder)

    def dense(self, replicate: int) -> Ticket:
        """Returns the level-0 ticket: nothing pruned, weights as initialised."""
        spec, seed = self.spec, self.spec.seed + replicate
        weights = self.blueprint.initial(seed)
        origin = {
            "seed": seed,
            "replicate": replicate,
            "arm": "ticket",
            "input_shape": list(self.trainer.input_shape),
            "classes": self.trainer.classes,
            "dataset": spec.dataset,
            "initial_sha256": storage.digest(weights),
        }
        mask = masks.ones(self.plan.shapes)
        return Ticket(mask, weights, 0, 0, origin, spec)

    def prune(self, ticket: Ticket, trained: Mapping, start: Mapping, level: int) -> Ticket:
        """Returns the next level's ticket, by the magnitudes of trained weights.

        Args:
          ticket: the last level's.
          trained: path -> array, what its training ended with.
          start: path -> array, the weights that the new ticket is cut out of.
          level: the new ticket's.
        """
        kernels = {name: trained[name] for name in ticket.mask}
        scores = SCORERS["magnitude"](None, kernels, None)
        mask: Mask = SCOPES[self.spec.scope](
            scores, self.plan.densities[level], within=ticket.mask
        )
        if said := ties(scores, self.plan.densities[level], mask, ticket.mask, self.spec.scope):
            self.say(f"level {level}: {said}")
        return dataclasses.replace(
            ticket,
            mask=mask,
            weights=masks.apply(mask, start),
            level=level,
            rewind_step=self.spec.retrain_span[0],
        )

    def pick(self, dense: Ticket, level: int) -> Ticket:
        """Returns the ticket that the spec's scorer picks; says what of the network is cut."""
        with distribute.scoring(self.trainer.strategy), self._told(f"level {level}"):
            ticket = picking.pick(
                dense, self.trainer.dataset, self.plan.densities[level], level,
                model=self.blueprint.holding(dense.weights),
            )  # fmt: skip
        through = analysis.connected(self.blueprint.plain, ticket.mask)
        found = analysis.collapse(ticket.mask, through)
        if self.progress or "warning" in found:
            self.say(found)
        return growing.scaled(ticket)

    def sow(self, dense: Ticket, level: int) -> Ticket:
        """Returns the ticket that a training under a moving mask begins with."""
        return growing.scaled(growing.sown(dense, self.plan.densities[level], level))

    @contextlib.contextmanager
    def _told(self, where: str) -> Iterator[None]:
        """Within, the user is told of equal scores as of everything else."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TiedScores)
            yield
        for one in caught:
            if issubclass(one.category, TiedScores):
                self.say(f"{where}: {one.message}")
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)

    def branches(self, folder: Path, ticket: Ticket, start: Mapping) -> None:
        """Trains a ticket's controls, each in a folder inside the ticket's.

        Args:
          folder: the ticket's.
          ticket: what they are run off.
          start: path -> array, the weights that the ticket's were cut out of.
        """
        for name in self.plan.controls.get(ticket.level, ()):
            here = folder / f"branch_{name}"
            with distribute.scoring(self.trainer.strategy), self._told(str(here)):
                control = self.ticket(here, branch, ticket, name, start, self.trainer.dataset)
            self.later(here, control)
