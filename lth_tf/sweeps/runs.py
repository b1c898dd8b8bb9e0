"""What is on disk of a sweep: the record of each run, who is at it, the index of all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lth_tf import storage
from lth_tf.analysis.summary import Row, columns, read_summary, write_csv
from lth_tf.errors import UserError
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec, differences
from lth_tf.sweeps.grid import Grid, Run
from lth_tf.tasks import metric_of

ABOUT = "run", "status", "preset", "dataset", "model", "method", "seed", "asked_density"
_PAUSE = 0.02  # seconds between two tries to hold the index


def load(workdir: Path, folder: str) -> dict[str, Any]:
    """Returns the run.json of a run.

    Args:
      workdir: the sweep's.
      folder: the run's, below it.

    Raises:
      UserError: it is absent, damaged, or another run's.
    """
    path = workdir / folder / "run.json"
    found = storage.read_json(path)
    with storage.reading(path, "is damaged", "it is made anew when the sweep is run again"):
        storage.require(set(_FITS) <= set(found), "not all of it is there")
        for name, fits in _FITS.items():
            storage.require(fits(found[name]), f"{name} is no such thing")
        try:
            Spec.from_dict(found["spec"])
        except UserError as error:
            raise ValueError(error) from error
    storage.require_meant(path, found, {"name": folder.removeprefix("runs/")})
    return found


def _maybe(kind: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kind)


_STATES = "waiting", "running", "finished", "interrupted", "failed"
# What run.json says, and whether a value out of it is such a thing.
_FITS: dict[str, Callable[[Any], bool]] = {
    "name": lambda value: isinstance(value, str),
    "status": lambda value: isinstance(value, str) and value in _STATES,
    "command": lambda v: isinstance(v, list) and all(isinstance(word, str) for word in v),
    "exit_code": lambda value: value is None or type(value) is int,
    "seconds": lambda value: value is None or (storage.is_number(value) and value >= 0),
    "error": _maybe(str),
    "preset": lambda value: isinstance(value, str),
    "trunk": _maybe(str),
    "spec": lambda value: isinstance(value, dict),
}


def read(workdir: Path, run: Run) -> dict[str, Any]:
    """Returns a run's run.json, {} where there is none or a damaged one.

    For a run that nothing is known of is begun again, and goes on from what its folder holds.
    """
    try:
        return load(workdir, run.folder)
    except UserError:
        return {}


def mend(workdir: Path, run: Run, say: Callable[[str], Any]) -> None:
    """Writes the run.json of a run anew where it is damaged or another run's, and says so.

    Args:
      workdir: the sweep's.
      run: whose it is.
      say: called with a sentence.
    """
    try:
        if (workdir / run.folder / "run.json").exists():
            load(workdir, run.folder)
    except UserError as error:
        say(f"{run.name}: begun again, and goes on from what is finished: {error}")
        record(workdir, run, "waiting")


def finished(workdir: Path, run: Run) -> bool:
    """Says whether a run ended well, with as many replicates as it should have."""
    found = read(workdir, run)
    return found.get("status") == "finished" and (
        found["spec"].get("replicates", 1) >= run.spec.replicates
    )


def _text(run: Run, status: str, **more: Any) -> str:
    """What run.json says of a run."""
    said = {
        "name": run.name,
        "status": status,
        "command": [run.tool, *run.words],
        "exit_code": None,
        "seconds": None,
        "error": None,
        "preset": run.preset,
        "trunk": run.trunk,
        "spec": run.spec.as_dict(),
        **more,
    }
    return json.dumps(said, indent=1) + "\n"


def record(workdir: Path, run: Run, status: str, **more: Any) -> None:
    """Writes run.json; whoever does holds the run.

    Args:
      workdir: the sweep's.
      run: whose it is.
      status: waiting, running, finished, interrupted or failed.
      **more: exit_code, seconds and error, where they are known.

    Raises:
      UserError: the file cannot be written.
    """
    storage.write(workdir / run.folder / "run.json", _text(run, status, **more))


def announce(workdir: Path, run: Run) -> None:
    """Writes the run.json of a run that waits, unless there is one; without holding the run.

    Held for a moment only, it would be taken for one that is being done.
    """
    path = workdir / run.folder / "run.json"
    beside = path.with_name(f".run.json.{os.getpid()}")
    storage.write(beside, _text(run, "waiting"))
    with contextlib.suppress(OSError):  # another process was quicker
        os.link(beside, path)
    beside.unlink()


def require_own(workdir: Path, runs: Sequence[Run]) -> None:
    """Raises UserError where a run's folder belongs to a run of another command."""
    for run in runs:
        found = read(workdir, run)
        theirs = Spec.from_dict(found["spec"]) if found else run.spec
        if theirs != run.spec:
            listed = differences(theirs.as_dict(), run.spec.as_dict())
            raise UserError(
                f"{str(workdir / run.folder)!r} belongs to another command "
                f"({' '.join(found['command'])}): {listed}; choose another --workdir, or delete "
                "that folder"
            )


def claim(held: contextlib.ExitStack, folder: Path) -> bool:
    """Holds a run's folder until `held` closes; False where another process has it.

    The run's own process locks the folder itself; this lock is there before and after it.

    Raises:
      UserError: the folder cannot be written.
    """
    try:
        held.enter_context(storage.lock(folder / ".sweep"))
        with storage.lock(folder):  # a process that outlived its sweep
            return True
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it cannot be written at all
            raise
        held.close()
        return False


def write_index(workdir: Path) -> None:
    """Writes index.json, an object for each run, and index.csv, a line for each training.

    They are made from all run.json and summary.csv there are; a run that is not finished
    has one line, without results. Densities and accuracies are fractions.
    """
    with contextlib.ExitStack() as held:
        # One after the other, so that the last one to write has seen all.
        while not claim(held, workdir / "runs"):
            time.sleep(_PAUSE)
        runs, lines = [], []
        for path in sorted(workdir.glob("runs/*/run.json")):
            run, rows, about = _told(workdir, path.parent)
            lines += [about | row for row in rows] or [about]
            runs.append({**run, "results": rows})
        results = dict.fromkeys(n for line in lines for n in columns(metric_of(line), line))
        write_csv(workdir / "index.csv", [*ABOUT, *(results or columns()), "error"], lines)
        storage.write(workdir / "index.json", json.dumps(runs, indent=1) + "\n")


def _told(workdir: Path, folder: Path) -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """What run.json says of a run, its results, and its part of each of its lines."""
    try:
        run = load(workdir, folder.relative_to(workdir).as_posix())
    except UserError as damage:  # that of one run, which must not stop the others
        run = {"name": folder.name, "status": "damaged", "error": str(damage)}
        return run, [], {"run": folder.name, "status": "damaged", "error": str(damage)}
    rows, error = [], run["error"]
    if run["status"] == "finished" and (folder / "summary.csv").exists():
        try:
            rows = read_summary(folder)
        except UserError as damage:
            error = str(damage)
    spec = Spec.from_dict(run["spec"])
    recipe = RECIPES[spec.recipe]
    asked = recipe.asked(spec)
    about = {
        "run": run["name"],
        "method": recipe.method(spec),
        "asked_density": asked[0] if len(asked) == 1 else None,
        **{name: getattr(spec, name) for name in ("dataset", "model", "seed")},
        **{name: run[name] for name in ("status", "preset")},
        "error": error,
    }
    return run, rows, about


def plan_rows(of: Grid, workdir: Path, shard: tuple[int, int]) -> Iterator[tuple[str, ...]]:
    """Yields for each trunk and run: name, what it is, its trunk, its shard, its status.

    Args:
      of: the whole grid.
      workdir: where it is done.
      shard: (i, n): it is told for n parts which one each run belongs to.
    """
    for each in of.trunks.values():
        shared = sum(run.trunk == each.folder for run in of.runs)
        status = read(workdir, each).get("status", "")
        yield each.folder, f"dense, for {shared} runs", "", "", status
    for i, run in enumerate(of.runs):
        status = read(workdir, run).get("status", "")
        yield run.name, run.tool, run.trunk or "", f"{i % shard[1] + 1}/{shard[1]}", status
