"""The processes of a sweep: as many runs at a time as asked for, signals, shares of the GPUs."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf import storage
from lth_tf.distribute.shares import gpu_share, gpus
from lth_tf.errors import UserError
from lth_tf.execution import cores, number_of
from lth_tf.recipes import RECIPES
from lth_tf.sweeps import runs
from lth_tf.sweeps.grid import Grid, Run

POLL = 0.1  # seconds between looks at the children
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


def execution_words(
    jobs: int, run_jobs: str = "1", engine: str | None = None, compact: str | None = None,
    threads: int | None = None,
) -> list[str]:  # fmt: skip
    """Returns the flags that say how each run of a sweep is computed.

    Args:
      jobs: runs at a time.
      run_jobs: trainings side by side in each of them; 'auto': each has its share of the cores.
      engine, compact, threads: of the runs; None: what they take by themselves, but not more
        threads than there are cores for all.

    Raises:
      UserError: no number, or more trainings at a time than there are cores.

    >>> execution_words(2, engine="sparse")
    ['--engine=sparse']
    """
    auto = run_jobs == "auto"
    each = max(1, cores() // jobs) if auto else number_of("run_jobs", run_jobs)
    many = jobs * each
    if each > 1:
        if many > cores():
            raise UserError(
                f"--jobs={jobs} runs of --run_jobs={each} trainings are {many} at a time, more "
                f"than the {cores()} core(s) here; give less of one of them"
            )
        threads = threads or cores() // many
    given = {
        "jobs": each if each > 1 else None, "engine": engine, "compact_training": compact,
        "threads": threads,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def command_of(run: Run, workdir: Path, data_dir: str | None) -> list[str]:
    """Returns the command line of a run's process.

    Args:
      run: what it does.
      workdir: the sweep's.
      data_dir: folder of the data sets (None: what the process finds by itself).
    """
    return [
        sys.executable, "-m", f"lth_tf.tools.{RECIPES[run.spec.recipe].module}", *run.words,
        f"--workdir={workdir / run.folder}",
        *([f"--data_dir={data_dir}"] if data_dir else []),
        *([f"--trunk={workdir / run.trunk}"] if run.trunk else []),
    ]  # fmt: skip


@dataclasses.dataclass
class _Child:
    """A run that is being done: its process, what holds it, where in log.txt it began."""

    run: Run
    process: subprocess.Popen
    held: contextlib.ExitStack
    log: Path
    offset: int
    began: float
    told: int = 0  # how many of the signals that came it was told of


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Within, SIGINT and SIGTERM only append their numbers to the list."""
    got: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: got.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield got
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    print(text, flush=True)


def sweep(
    of: Grid,
    workdir: Path,
    *,
    jobs: int = 1,
    shard: tuple[int, int] = (1, 1),
    data_dir: str | None = None,
    more: Sequence[str] = (),
    command: Callable[[Run, Path, str | None], list[str]] = command_of,
    found: Sequence[str] | None = None,
    say: Callable[[str], Any] = _say,
) -> int:
    """Does the runs of a grid that are not finished, each in a process of its own.

    Any number of these may work in one workdir: a run that another one is at is left to
    it, a trunk waited for. What failed or was interrupted is done again the next time.

    Args:
      of: the whole grid.
      workdir: folder for everything.
      jobs: how many at a time.
      shard: (i, n): of the grid's runs the i-th of n parts, i from 1.
      data_dir: folder of the data sets.
      more: flags for every run besides its own, see `execution_words`.
      command: (run, workdir, data_dir) -> command line.
      found: the GPUs to share out among the jobs (default: those that there are).
      say: called with a line for everything that happens.

    Returns:
      The exit code: 0, 1 if a run failed, 130 or 143 if SIGINT or SIGTERM came.

    Raises:
      UserError: a folder that belongs to a run of another command, or cannot be written.
    """
    found = gpus() if found is None else found
    for run in [*of.trunks.values(), *of.runs]:
        runs.mend(workdir, run, say)
    runs.require_own(workdir, of.runs)
    for run in of.runs:
        if not runs.read(workdir, run):
            runs.announce(workdir, run)
    todo = [run for run in of.runs[shard[0] - 1 :: shard[1]] if not runs.finished(workdir, run)]
    needed = [of.trunks[folder] for folder in dict.fromkeys(r.trunk for r in todo) if folder]
    queue = [each for each in needed if not runs.finished(workdir, each)] + todo
    part = f", part {shard[0]} of {shard[1]}" if shard[1] > 1 else ""
    say(f"{len(of.runs)} run(s){part}: {len(todo)} to do, {len(queue) - len(todo)} trunk(s) first")
    active: dict[int, _Child] = {}
    failed: dict[str, str] = {}
    waited: set[str] = set()
    runs.write_index(workdir)
    with _signals() as got:
        try:
            while active or (queue and not got):
                for slot in sorted(set(range(jobs)) - set(active)) if not got else ():
                    busy = {child.run.folder for child in active.values()}
                    if taken := _next(queue, workdir, busy, failed, waited, say):
                        words = [*command(taken[0], workdir, data_dir), *more]
                        active[slot] = _begin(*taken, workdir, words, gpu_share(found, slot, jobs))
                        say(f"{taken[0].name}: started; log: {active[slot].log}")
                time.sleep(POLL if active else 5 * POLL)
                for slot, child in list(active.items()):
                    if child.told < len(got) and child.process.poll() is None:
                        child.told = len(got)
                        # A scheduler may repeat SIGTERM; who presses Ctrl-C twice means it.
                        again = got.count(signal.SIGINT) > 1
                        child.process.send_signal(signal.SIGKILL if again else got[-1])
                    if child.process.poll() is not None:
                        del active[slot]
                        if error := _end(child, workdir, bool(got), say):
                            failed[child.run.folder] = error
        finally:
            for child in active.values():  # it is this process that failed
                child.process.terminate()
            for child in active.values():
                _end(child, workdir, True, say)
            runs.write_index(workdir)
    _report(of, workdir, failed, say)
    return 128 + got[0] if got else int(bool(failed))


def _next(
    queue: list[Run],
    workdir: Path,
    busy: set[str],
    failed: dict[str, str],
    waited: set[str],
    say: Callable[[str], Any],
) -> tuple[Run, contextlib.ExitStack] | None:
    """Takes the first run that can start off the queue, with what holds it for us.

    Runs without a chance to start are taken off, too: their trunk failed, or another
    process is at them or has finished them.
    """
    for run in list(queue):
        if run.trunk and (run.trunk in busy or any(r.folder == run.trunk for r in queue)):
            continue
        held, is_trunk = contextlib.ExitStack(), run.folder.startswith("trunks/")
        if not runs.claim(held, workdir / run.folder):
            if not is_trunk:
                queue.remove(run)
                say(f"{run.name}: left to another process, which is working on it")
            elif run.folder not in waited:
                waited.add(run.folder)
                say(f"{run.name}: waiting for another process, which is training it")
            continue
        queue.remove(run)
        before = runs.read(workdir, run)
        if run.trunk in failed:
            failed[run.folder] = f"its trunk failed: {failed[run.trunk]}"
            runs.record(workdir, run, "failed", error=failed[run.folder])
            say(f"{run.name}: not started, since {run.trunk} failed")
        elif is_trunk and run.folder in waited and before.get("status") == "failed":
            failed[run.folder] = before["error"]  # just now; it would fail again
            say(f"{run.name}: failed in the other process: {before['error']}")
        elif not runs.finished(workdir, run):
            return run, held
        held.close()
    return None


def _begin(
    run: Run, held: contextlib.ExitStack, workdir: Path, words: list[str], share: dict[str, str]
) -> _Child:
    """Starts a run's process, which writes to its log.txt."""
    runs.record(workdir, run, "running")
    runs.write_index(workdir)
    path = workdir / run.folder / "log.txt"
    with storage.explained(path):
        log = open(path, "ab")  # noqa: SIM115
    with log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        offset = log.tell()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **share},
            start_new_session=True,  # else a terminal's Ctrl-C would reach it twice
        )
    return _Child(run, process, held, path, offset, time.monotonic())


def _end(child: _Child, workdir: Path, asked: bool, say: Callable[[str], Any]) -> str | None:
    """Records how a run's process ended; returns the error where it failed by itself.

    Args:
      child: the run; its process has ended or is about to.
      asked: whether it was asked to end.
    """
    code, seconds = child.process.wait(), round(time.monotonic() - child.began, 2)
    error, status = None, "finished"
    if code:
        status = "interrupted" if asked and code in INTERRUPTED else "failed"
        error = _last_error(child.log, child.offset, code)
    runs.record(workdir, child.run, status, exit_code=code, seconds=seconds, error=error)
    child.held.close()
    runs.write_index(workdir)
    reason = f": {error}" if status == "failed" else ""
    say(f"{child.run.name}: {status} after {seconds:.0f} s{reason}")
    return error if status == "failed" else None


def _last_error(log: Path, offset: int, code: int) -> str:
    """Returns the last line of a log that begins with 'error:', or else the last one."""
    with open(log, "rb") as file:
        file.seek(offset)
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or [f"exit code {code}"])[-1]
    return f"killed by {signal.Signals(-code).name}; before: {last}" if code < 0 else last


def _report(of: Grid, workdir: Path, failed: Mapping[str, str], say: Callable[[str], Any]) -> None:
    """Says how the grid as a whole stands, and which runs failed here."""
    found = (runs.read(workdir, run) for run in of.runs)
    states = collections.Counter(each.get("status", "waiting") for each in found)
    say(", ".join(f"{count} {status}" for status, count in states.items()))
    for folder, error in failed.items():
        say(f"failed: {folder}: {error}; log: {workdir / folder / 'log.txt'}")
    say(str(workdir / "index.csv"))
