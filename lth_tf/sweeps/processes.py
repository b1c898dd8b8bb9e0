"""Sweeps: a grid of experiments as processes of their own, with one index of what came out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lth_tf import flags, storage
from lth_tf.analysis.summary import read_csv, write_csv
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.experiments import trunk
from lth_tf.spec import Spec

COLUMNS = (
    "run", "status", "preset", "dataset", "model", "method", "seed", "asked_density",
    "arm", "replicate", "level", "density", "early_stop_step", "validation_loss_min",
    "test_accuracy_early", "test_accuracy_end", "steps", "seconds", "error",
)  # fmt: skip
ABSENT: tuple[Any, ...] = (None,)
POLL = 0.1  # seconds between looks at the children
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a grid.

    Attributes:
      folder: below the sweep's workdir: 'runs/NAME', or 'trunks/DIGEST' for a trunk.
      words: the flags that say what it is.
      spec: the same, parsed.
      preset: name of its preset or flag file, or ''.
      trunk: folder of the trunk that it takes its dense training from, or None.
    """

    folder: str
    words: tuple[str, ...]
    spec: Spec
    preset: str = ""
    trunk: str | None = None

    @property
    def name(self) -> str:
        """The folder without 'runs/'."""
        return self.folder.removeprefix("runs/")

    @property
    def tool(self) -> str:
        """The console command that does it."""
        return {"imp": "lth-imp", "one_shot": "lth-oneshot"}[self.spec.recipe]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of a sweep, and the trunks that two or more of them share, by folder."""

    runs: list[Run]
    trunks: dict[str, Run]

    @property
    def saved(self) -> int:
        """How many dense trainings need not be done, replicates counted."""
        shared = sum(run.spec.replicates for run in self.runs if run.trunk)
        return shared - sum(each.spec.replicates for each in self.trunks.values())


def grid(
    presets: Sequence[str] | None,
    seeds: Sequence[str] | None,
    densities: Sequence[str] | None,
    scorers: Sequence[str] | None,
    passed: Sequence[str] = (),
) -> Grid:
    """Returns all combinations, each parsed; an axis that is None is left to the other flags.

    A run's name has its value on each axis that is given, even if it is the only one, so
    that it stays the same when the grid grows.

    Args:
      presets: names of presets, or paths of flag files.
      seeds, densities, scorers: values, as on a command line. A density is the only
        ticket's for lth-oneshot, the last level's for lth-imp.
      passed: flags of lth-imp or lth-oneshot for every run.

    Raises:
      UserError: an axis without values, with one twice, or that `passed` has, too; scorers
        for lth-imp; a run that cannot be parsed (says which), or two that are the same.
    """
    axes = {"presets": presets, "scorers": scorers, "densities": densities, "seeds": seeds}
    for axis, values in axes.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise UserError(f"--{axis}={','.join(values)} must name different values")
    given = {word.lstrip("-").partition("=")[0] for word in passed}
    runs: list[Run] = []
    for preset, scorer, density, seed in itertools.product(
        *(values or ABSENT for values in axes.values())
    ):
        stem = Path(preset).name.removesuffix(".flags") if preset else ""
        parts = stem, scorer, density and f"density{density}", seed and f"seed{seed}"
        name = "-".join(filter(None, parts)) or "run"
        base = (*_preset_words(preset), *passed)
        try:
            recipe = flags.recipe_of(base)
            if scorer and recipe == "imp":
                raise UserError("--scorers are for lth-oneshot, and its other flags for lth-imp")
            recipe = recipe or ("one_shot" if scorer else "imp")
            whose = "density" if recipe == "one_shot" else "target_density"
            point = {"scorer": scorer, whose: density, "seed": seed}
            own = {field: value for field, value in point.items() if value}
            if twice := given & {*own, "compression" if density else ""}:
                raise UserError(f"--{min(twice)} is given after --, but is an axis of the grid")
            words = (*base, *(f"--{field}={value}" for field, value in own.items()))
            spec = flags.parse(words, recipe)
            if density and float(density) not in (spec.target_density, *spec.density):
                raise UserError("its flag file has --compression, which overrules --densities")
        except UserError as error:
            raise UserError(f"run {name!r}: {error}") from error
        for other in runs:
            if other.spec == spec or other.folder == f"runs/{name}":
                raise UserError(f"the runs {other.name!r} and {name!r} are the same; give one")
        runs.append(Run(f"runs/{name}", words, spec, stem))
    return _with_trunks(runs)


def _preset_words(preset: str | None) -> tuple[str, ...]:
    if preset is None:
        return ()
    is_path = os.sep in preset or preset.endswith(".flags")
    return (f"--flagfile={preset}" if is_path else f"--preset={preset}",)


def _with_trunks(runs: Sequence[Run]) -> Grid:
    """Gives the runs that share their dense training its trunk."""
    groups: dict[tuple, list[Spec]] = {}
    for run in runs:
        if run.spec.recipe == "imp" or run.spec.dense:
            groups.setdefault(_dense(run.spec), []).append(run.spec)
    trunks = {}
    for dense, members in groups.items():
        spec = dataclasses.replace(
            trunk.spec(members[0]),
            replicates=max(m.replicates for m in members),
            histograms=any(m.histograms for m in members),
        )
        if len(members) > 1 and _dense(spec) == dense:
            trunks[dense] = Run(f"trunks/{spec.digest()}", words_of(spec), spec)
    of = {
        run.name: trunks.get(_dense(run.spec))
        for run in runs
        if run.spec.recipe == "imp" or run.spec.dense
    }
    return Grid(
        [dataclasses.replace(r, trunk=t.folder) if (t := of.get(r.name)) else r for r in runs],
        {each.folder: each for each in trunks.values()},
    )


def _dense(spec: Spec) -> tuple:
    return tuple(sorted(trunk.trunk_fields(spec).items()))


def words_of(spec: Spec) -> tuple[str, ...]:
    """Returns the flags that describe an imp spec: those of its fields that are not default."""
    words = []
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value == field.default or not field.metadata.get("flag", True):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no'}{field.name}")
        else:
            listed = value if isinstance(value, tuple) else (value,)
            words.append(f"--{field.name}={','.join(map(str, listed))}")
    return tuple(words)


def shard_of(text: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns which part of a grid is this process's: (i, n), i from 1 to n.

    Args:
      text: 'i/n', or None: the place of a Slurm array task in its array, else (1, 1).
      environ: the environment variables.

    Raises:
      UserError: not of that form, out of range, or an array with gaps.

    >>> shard_of("2/3", {})
    (2, 3)
    """
    if text is not None:
        i, slash, n = text.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            raise UserError(f"shard {text!r} is not i/n with i from 1 to n, e.g. --shard=1/4")
        return int(i), int(n)
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    if not all(environ.get(name, "").isdecimal() for name in names):
        return 1, 1
    task, first, last, count = (int(environ[name]) for name in names)
    step = (last - first) // (count - 1) if count > 1 else 1
    if first + step * (count - 1) != last or (task - first) % step:
        raise UserError(
            f"the Slurm array's {count} tasks from {first} to {last} are no evenly spaced range, "
            f"so that the place of task {task} is not known; give --shard=i/n"
        )
    return (task - first) // step + 1, count


def gpus(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Returns the GPUs that processes may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in environ:
        listed = environ["CUDA_VISIBLE_DEVICES"].split(",")
        # CUDA's own rule: what follows an invalid one does not count.
        valid = itertools.takewhile(lambda d: d and d != "-1", (d.strip() for d in listed))
        return list(valid)
    return [str(i) for i in range(len(tf.config.list_physical_devices("GPU")))]


def gpu_share(found: Sequence[str], slot: int, jobs: int) -> dict[str, str]:
    """Returns the environment variables that give a slot its share of the GPUs.

    All shares are of one size, for the number of replicas is part of an experiment. Where
    there are more slots than GPUs, some share one, and none may take all its memory.

    >>> gpu_share(["0", "1", "2", "3"], 1, 2), gpu_share(["0", "1", "2"], 1, 2)
    ({'CUDA_VISIBLE_DEVICES': '2,3'}, {'CUDA_VISIBLE_DEVICES': '1'})
    """
    if jobs == 1 or not found:
        return {}
    size = max(len(found) // jobs, 1)
    first = slot * size % len(found)
    share = {"CUDA_VISIBLE_DEVICES": ",".join(found[first : first + size])}
    return share | ({"TF_FORCE_GPU_ALLOW_GROWTH": "true"} if jobs > len(found) else {})


def command_of(run: Run, workdir: Path, data_dir: str | None) -> list[str]:
    """Returns the command line of a run's process."""
    return [
        sys.executable, "-m", f"lth_tf.tools.{run.spec.recipe}", *run.words,
        f"--workdir={workdir / run.folder}",
        *([f"--data_dir={data_dir}"] if data_dir else []),
        *([f"--trunk={workdir / run.trunk}"] if run.trunk else []),
    ]  # fmt: skip


# --- What is on disk ---


def read(workdir: Path, run: Run) -> dict[str, Any]:
    """Returns a run's run.json, {} where there is none; raises UserError if it is damaged."""
    path = workdir / run.folder / "run.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{str(path)!r} cannot be read ({error}); delete it") from error


def finished(workdir: Path, run: Run) -> bool:
    """Says whether a run ended well, with as many replicates as it should have."""
    found = read(workdir, run)
    return found.get("status") == "finished" and (
        found["spec"].get("replicates", 1) >= run.spec.replicates
    )


def _text(run: Run, status: str, **more: Any) -> str:
    """What run.json says of a run."""
    record = {
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
    return json.dumps(record, indent=1) + "\n"


def _record(workdir: Path, run: Run, status: str, **more: Any) -> None:
    """Writes run.json; whoever does holds the run."""
    storage.write(workdir / run.folder / "run.json", _text(run, status, **more))


def _announce(workdir: Path, run: Run) -> None:
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
            there, here = theirs.as_dict(), run.spec.as_dict()
            listed = "; ".join(
                f"{name} is {there[name]!r} there, {here[name]!r} here"
                for name in here
                if there[name] != here[name]
            )
            raise UserError(
                f"{str(workdir / run.folder)!r} belongs to another command "
                f"({' '.join(found['command'])}): {listed}; choose another --workdir, or delete "
                "that folder"
            )


def _claim(held: contextlib.ExitStack, folder: Path) -> bool:
    """Holds a run for this process until `held` closes; False where another one has it.

    The run's own process locks the folder itself; this lock is there before and after it.
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
        while not _claim(held, workdir / "runs"):
            time.sleep(POLL / 5)
        runs, lines = [], []
        for path in sorted(workdir.glob("runs/*/run.json")):
            run = json.loads(path.read_text())
            spec, summary = run["spec"], path.with_name("summary.csv")
            done = run["status"] == "finished" and summary.exists()
            rows = read_csv(summary) if done else []
            picked = spec["recipe"] == "one_shot"
            asked = spec["density"] if picked else [spec["target_density"]]
            about = {
                "run": run["name"],
                "method": spec["scorer"] if picked else "imp",
                "asked_density": asked[0] if len(asked) == 1 else None,
                **{name: spec[name] for name in ("dataset", "model", "seed")},
                **{name: run[name] for name in ("status", "preset", "error")},
            }
            lines += [about | row for row in rows] or [about]
            runs.append({**run, "results": rows})
        write_csv(workdir / "index.csv", COLUMNS, lines)
        storage.write(workdir / "index.json", json.dumps(runs, indent=1) + "\n")


# --- Processes ---


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
      command: (run, workdir, data_dir) -> command line.
      found: the GPUs to share out among the jobs (default: those that there are).
      say: called with a line for everything that happens.

    Returns:
      The exit code: 0, 1 if a run failed, 130 or 143 if SIGINT or SIGTERM came.

    Raises:
      UserError: a folder that belongs to a run of another command, or cannot be written.
    """
    found = gpus() if found is None else found
    require_own(workdir, of.runs)
    for run in of.runs:
        if not read(workdir, run):
            _announce(workdir, run)
    todo = [run for run in of.runs[shard[0] - 1 :: shard[1]] if not finished(workdir, run)]
    needed = [of.trunks[folder] for folder in dict.fromkeys(r.trunk for r in todo) if folder]
    queue = [each for each in needed if not finished(workdir, each)] + todo
    part = f", part {shard[0]} of {shard[1]}" if shard[1] > 1 else ""
    say(f"{len(of.runs)} run(s){part}: {len(todo)} to do, {len(queue) - len(todo)} trunk(s) first")
    active: dict[int, _Child] = {}
    failed: dict[str, str] = {}
    waited: set[str] = set()
    write_index(workdir)
    with _signals() as got:
        try:
            while active or (queue and not got):
                for slot in sorted(set(range(jobs)) - set(active)) if not got else ():
                    busy = {child.run.folder for child in active.values()}
                    if taken := _next(queue, workdir, busy, failed, waited, say):
                        words = command(taken[0], workdir, data_dir)
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
            write_index(workdir)
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
        if not _claim(held, workdir / run.folder):
            if not is_trunk:
                queue.remove(run)
                say(f"{run.name}: left to another process, which is working on it")
            elif run.folder not in waited:
                waited.add(run.folder)
                say(f"{run.name}: waiting for another process, which is training it")
            continue
        queue.remove(run)
        before = read(workdir, run)
        if run.trunk in failed:
            failed[run.folder] = f"its trunk failed: {failed[run.trunk]}"
            _record(workdir, run, "failed", error=failed[run.folder])
            say(f"{run.name}: not started, since {run.trunk} failed")
        elif is_trunk and run.folder in waited and before.get("status") == "failed":
            failed[run.folder] = before["error"]  # just now; it would fail again
            say(f"{run.name}: failed in the other process: {before['error']}")
        elif not finished(workdir, run):
            return run, held
        held.close()
    return None


def _begin(
    run: Run, held: contextlib.ExitStack, workdir: Path, words: list[str], share: dict[str, str]
) -> _Child:
    """Starts a run's process, which writes to its log.txt."""
    _record(workdir, run, "running")
    write_index(workdir)
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
    _record(workdir, child.run, status, exit_code=code, seconds=seconds, error=error)
    child.held.close()
    write_index(workdir)
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
    states = collections.Counter(read(workdir, run).get("status", "waiting") for run in of.runs)
    say(", ".join(f"{count} {status}" for status, count in states.items()))
    for folder, error in failed.items():
        say(f"failed: {folder}: {error}; log: {workdir / folder / 'log.txt'}")
    say(str(workdir / "index.csv"))


def plan_rows(of: Grid, workdir: Path, shard: tuple[int, int]) -> Iterator[tuple[str, ...]]:
    """Yields for each trunk and run: name, what it is, its trunk, its shard, its status."""
    for each in of.trunks.values():
        shared = sum(run.trunk == each.folder for run in of.runs)
        status = read(workdir, each).get("status", "")
        yield each.folder, f"dense, for {shared} runs", "", "", status
    for i, run in enumerate(of.runs):
        status = read(workdir, run).get("status", "")
        yield run.name, run.tool, run.trunk or "", f"{i % shard[1] + 1}/{shard[1]}", status
