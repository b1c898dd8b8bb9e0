"""Trunks: a dense training that several experiments share, since masks have no part in it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lth_tf import storage
from lth_tf.errors import UserError
from lth_tf.experiments.workdirs import read_spec, read_training
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, differences, fields_of
from lth_tf.tickets import Ticket, load_ticket
from lth_tf.training import checkpoints


def trunk_fields(spec: Spec) -> dict[str, Any]:
    """Returns what the dense training depends on: name -> value.

    Besides fields of Spec that is `rewind_at`: the step whose weights a trunk must have saved.
    """
    names = fields_of(role="training", grows=False)
    return {name: getattr(spec, name) for name in names} | {"rewind_at": spec.rewind_at}


def spec(run: Spec) -> Spec:
    """Returns the experiment that is nothing but the dense trainings of `run`.

    Equal for all experiments with equal `trunk_fields`, replicates and TensorBoard logs.
    """
    names = [*fields_of(role="training"), *fields_of(role="course")]
    values = {name: getattr(run, name) for name in names}
    return Spec(recipe="imp", levels=0, rewind_step=float(run.rewind_at), **values)


def require(trunk_workdir: Path, run: Spec, workdir: Path) -> None:
    """Checks that a folder is the workdir of a dense training that `run` can take.

    Nothing is asked of it where all replicates have their dense training already.

    Args:
      trunk_workdir: what was given as the trunk.
      run: the experiment.
      workdir: its folder.

    Raises:
      UserError: it is not, and says why.
    """
    given = os.fspath(trunk_workdir)
    levels = [Path(workdir) / f"replicate_{i:02d}" / "level_00" for i in range(run.replicates)]
    if all((level / "trained.safetensors").exists() for level in levels):
        return
    if not Path(trunk_workdir).is_dir():
        raise UserError(f"there is no trunk {given!r}: no such folder")
    if Path(trunk_workdir).resolve() == Path(workdir).resolve():
        raise UserError(f"the trunk {given!r} is the workdir itself; give another folder, or none")
    if not RECIPES[run.recipe].has_dense(run):
        raise UserError(
            f"the trunk {given!r} has no meaning for an experiment that trains no dense network; "
            "give none"
        )
    theirs = read_spec(Path(trunk_workdir))
    if not RECIPES[theirs.recipe].has_dense(theirs):
        raise UserError(f"{given!r} is no trunk: its experiment trains no dense network")
    listed = differences(trunk_fields(theirs), trunk_fields(run))
    if listed:
        raise _no_trunk(given, listed)


def _no_trunk(given: str, listed: str) -> UserError:
    return UserError(
        f"{given!r} is no trunk of this experiment: {listed}; give the trunk of the same dense "
        "training, or none"
    )


def take(trunk_workdir: Path, folder: Path, ticket: Ticket, files: Sequence[str]) -> bool:
    """Puts a trunk's dense training into `folder`, as if `ticket` had been trained there.

    Args:
      trunk_workdir: workdir of an experiment whose level 0 it is.
      folder: level 0 of a replicate.
      ticket: the dense ticket of that replicate.
      files: names of the files to take, besides the TensorBoard logs. The mark that all is
        there, trained.safetensors, comes last.

    Returns:
      Whether it was there and taken; False if the trunk has not finished it.

    Raises:
      UserError: there is no such folder, it holds another dense training (says what
        differs), or one of its files is damaged.
    """
    if not Path(trunk_workdir).is_dir():
        raise UserError(f"there is no trunk {os.fspath(trunk_workdir)!r}: no such folder")
    source = Path(trunk_workdir) / f"replicate_{ticket.origin['replicate']:02d}" / "level_00"
    if not (source / "ticket.safetensors").exists():
        return False
    _require_same(load_ticket(source / "ticket.safetensors"), ticket, source)
    if not all((source / name).exists() for name in files):
        return False
    read_training(source, ticket)
    rewound = {
        name: load_ticket(source / name) for name in files if name == "rewind.safetensors"
    }  # a ticket, which names its experiment
    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    for log in sorted((source / "tensorboard").rglob("*")):
        if log.is_file():
            _link(log, folder / log.relative_to(source))
    for name in sorted(files, key=lambda name: name == "trained.safetensors"):
        if there := rewound.get(name):
            dataclasses.replace(ticket, weights=there.weights, rewind_step=there.rewind_step).save(
                folder / name
            )
        else:
            _link(source / name, folder / name)
    checkpoints.clear(folder)
    return True


def _require_same(theirs: Ticket, mine: Ticket, source: Path) -> None:
    """Raises UserError unless two dense tickets are trained alike, from the same weights."""
    listed = differences(
        {**theirs.origin, **trunk_fields(theirs.spec)}, {**mine.origin, **trunk_fields(mine.spec)}
    )
    if listed:
        raise _no_trunk(os.fspath(source), listed)


def _link(source: Path, target: Path) -> None:
    """Makes `target` the same file as `source`; across file systems a copy."""
    with storage.explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without links
            pass
        beside = target.with_name(f".{target.name}.copy")
        shutil.copyfile(source, beside)
        os.replace(beside, target)
