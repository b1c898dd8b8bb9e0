"""Workdirs: whose a folder is, what it was begun with, and which trainings are finished in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import edge, storage
from lth_tf.analysis.summary import read_metrics
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, differences
from lth_tf.tickets import Ticket, load_trained


def require_own(workdir: Path, spec: Spec) -> None:
    """Checks that `workdir` is the spec's, or nobody's; what was never finished is removed.

    Raises:
      UserError: the folder belongs to another spec; names the fields that differ.
    """
    path = workdir / "spec.json"
    if path.exists():
        found = read_spec(workdir)
        only = spec.recipe != found.recipe and "recipe"  # whose fields are others, too
        there, here = (
            {n: v for n, v in s.identity().items() if n == (only or n)} for s in (found, spec)
        )
        costly = "ticket.*" if RECIPES[found.recipe].picks else "checkpoint_*"
        begun = any(workdir.glob(f"replicate_*/**/{costly}"))
        listed = differences(there, here)
        if listed and not begun and next(finished(workdir), None) is None:
            # Whoever had it never finished anything: a first try with a mistake in it.
            for folder in workdir.glob("replicate_*"):
                shutil.rmtree(folder)
        elif listed:
            raise UserError(
                f"{str(workdir)!r} belongs to another experiment: {listed}; choose another "
                "--workdir or the same values"
            )


def write_spec(workdir: Path, spec: Spec) -> None:
    """Writes spec.json."""
    text = json.dumps({**spec.as_dict(), "format_number": storage.FORMAT}, indent=1, sort_keys=True)
    storage.write(workdir / "spec.json", text + "\n")


def read_spec(workdir: Path) -> Spec:
    """Returns the spec of a workdir; raises UserError where there is none or it is damaged."""
    workdir = edge.folder(workdir)
    path = workdir / "spec.json"
    if not path.is_file():
        raise UserError(
            f"{str(workdir)!r} is not the workdir of an experiment: there is no {path.name} in it"
        )
    values = storage.read_json(path)
    storage.require_format(path, values.pop("format_number", None))
    with storage.reading(path, "cannot be read", "delete it"):
        try:
            return Spec.from_dict(values)
        except UserError as error:
            raise ValueError(error) from error


def threads() -> int:
    """Returns how many threads TensorFlow computes an operation with on this machine's CPUs."""
    asked = os.environ.get("TF_NUM_INTRAOP_THREADS", "")
    schedulable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return (
        tf.config.threading.get_intra_op_parallelism_threads()
        or (int(asked) if asked.isdecimal() else 0)
        or len(schedulable(0))
    )


def note_threads(workdir: Path) -> str:
    """Writes threads.json where nothing was computed yet; else says if there are others now.

    It is no part of the experiment: its spec, digest and tickets know nothing of it.

    Returns:
      A sentence, or ''.

    Raises:
      UserError: the file cannot be written, or is damaged.
    """
    if not any(workdir.glob("replicate_*")):
        storage.write(workdir / "threads.json", json.dumps({"threads": threads()}) + "\n")
        return ""
    return other_threads(workdir)


def other_threads(workdir: Path) -> str:
    """Returns a sentence where a workdir was begun with other threads than there are now, or ''.

    Of a workdir without threads.json nothing is known and nothing said.

    Raises:
      UserError: it is damaged.
    """
    path, here = workdir / "threads.json", threads()
    if not path.exists():
        return ""
    values = storage.read_json(path)
    remedy = "delete it: then nothing is said of the threads that the workdir was begun with"
    with storage.reading(path, "is damaged", remedy):
        there = values["threads"]
        storage.require(storage.is_count(there) and there, f"threads is {there!r}")
    if there == here:
        return ""
    return (
        f"{str(workdir)!r} was begun with {there} thread(s) for each operation, and now there are "
        f"{here}: convolutions add up in another order then, so that what is trained now need not "
        f"be what it would have been bit for bit; for that set TF_NUM_INTRAOP_THREADS={there}"
    )


def finished(workdir: Path) -> Iterator[Path]:
    """Yields the folders of a workdir whose training is finished."""
    for path in sorted(Path(workdir).glob("replicate_*/level_*/**/trained.safetensors")):
        yield path.parent


def read_training(
    folder: Path, ticket: Ticket
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Returns the weights that a finished training ended with, and its evaluations.

    Args:
      folder: where they are.
      ticket: whose training it must be.

    Raises:
      OtherFile: a file is whole, but of another training.
      UserError: a file is absent or damaged.
    """
    path = folder / "metrics.csv"
    rows, digest = read_metrics(path)
    weights = load_trained(folder / "trained.safetensors", ticket, digest)
    storage.require_meant(
        path, {"its first step": rows[0]["step"]}, {"its first step": ticket.rewind_step}
    )
    return weights, rows
