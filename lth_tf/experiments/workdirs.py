"""Workdirs: whose a folder is, what it was begun with, and which trainings are finished in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lth_tf import edge, storage
from lth_tf.analysis.summary import read_metrics
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.execution import COMPACT, ENGINES, Execution, cores
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
    return (
        tf.config.threading.get_intra_op_parallelism_threads()
        or (int(asked) if asked.isdecimal() else 0)
        or cores()
    )


def take_threads(workdir: Path, asked: int | None, share: int | None = None) -> None:
    """Has TensorFlow take as many threads as a workdir was begun with, or as are asked for.

    Args:
      workdir: the folder.
      asked: what the user wants; None: what the workdir was begun with, for a new one `share`.
      share: of this process, where others compute beside it; None: all.

    Raises:
      UserError: the workdir was begun with another number; or it is too late, for TensorFlow has
        computed something.
    """
    workdir = edge.folder(workdir)
    begun = read_execution(workdir) if any(workdir.glob("replicate_*")) else None
    if begun and asked not in (None, begun.threads):
        raise UserError(
            f"{str(workdir)!r} was begun with --threads={begun.threads}; give that, or leave it "
            f"out, or choose another --workdir for --threads={asked}"
        )
    told = "TF_NUM_INTRAOP_THREADS" in os.environ  # by who knows what he does
    wanted = asked or (None if told else begun.threads if begun else share)
    if wanted and wanted != threads():
        try:
            tf.config.threading.set_intra_op_parallelism_threads(wanted)
        except RuntimeError as error:
            raise UserError(
                f"--threads={wanted} comes too late: TensorFlow has computed something already"
            ) from error


class Begun(NamedTuple):
    """How a workdir was begun to be computed; the defaults are those of before it was told.

    Attributes:
      engine, compact: see `Execution`.
      threads: for each operation; 0: not known.
    """

    engine: str = "tensorflow"
    compact: str = "off"
    threads: int = 0


def read_execution(workdir: Path) -> Begun | None:
    """Returns how a workdir was begun; None: nothing is known.

    Raises:
      UserError: what tells it is damaged.
    """
    for name in ("execution.json", "threads.json"):  # the latter is of before there were engines
        path = workdir / name
        if not path.exists():
            continue
        values = storage.read_json(path)
        storage.require_format(path, values.get("format_number"))
        remedy = "delete it: then nothing is known of how the workdir was begun"
        with storage.reading(path, "is damaged", remedy):
            known = {"engine": "engine", "compact_training": "compact", "threads": "threads"}
            begun = Begun(**{known[k]: v for k, v in values.items() if k in known})
            storage.require(begun.engine in ENGINES, f"engine is {begun.engine!r}")
            storage.require(begun.compact in COMPACT, f"compact_training is {begun.compact!r}")
            count = begun.threads
            storage.require(storage.is_count(count) and count, f"threads is {count!r}")
        return begun
    return None


def settled(workdir: Path, asked: Execution) -> Execution:
    """Returns what a workdir is computed with, which is the same from its beginning on.

    Args:
      workdir: the folder.
      asked: what the user wants.

    Raises:
      UserError: it was begun with something else.
    """
    if not any(workdir.glob("replicate_*")):
        return Execution(asked.engine or "tensorflow", asked.compact or "auto")
    begun = read_execution(workdir) or Begun()
    for flag, there, given in (
        ("engine", begun.engine, asked.engine),
        ("compact_training", begun.compact, asked.compact),
    ):
        if given not in (None, there):
            raise UserError(
                f"{str(workdir)!r} was begun with --{flag}={there}; give that, or leave it out, or "
                f"choose another --workdir for --{flag}={given}"
            )
    return Execution(begun.engine, begun.compact)


def note_execution(workdir: Path, execution: Execution) -> str:
    """Writes execution.json where nothing was computed yet; else says if threads are others now.

    It is no part of the experiment: its spec, digest and tickets know nothing of it.

    Args:
      workdir: the folder.
      execution: as `settled` returns it.

    Returns:
      A sentence, or ''.

    Raises:
      UserError: the file cannot be written, or is damaged.
    """
    if any(workdir.glob("replicate_*")):
        return other_threads(workdir)
    values = {
        "engine": execution.engine, "compact_training": execution.compact,
        "format_number": storage.FORMAT, "threads": threads(),
    }  # fmt: skip
    storage.write(workdir / "execution.json", json.dumps(values) + "\n")
    return ""


def other_threads(workdir: Path) -> str:
    """Returns a sentence where a workdir was begun with other threads than there are now, or ''.

    Raises:
      UserError: what tells it is damaged.
    """
    here = threads()
    there = (read_execution(workdir) or Begun()).threads or here
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
