"""Checkpoints inside a training: the last two states, in files that tell whether they are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import masks, storage
from lth_tf.errors import UserError
from lth_tf.execution import Decision
from lth_tf.tickets import Ticket
from lth_tf.training.states import Interrupted, State, require_rows

NEWEST = 2
_PATTERN = "checkpoint_*.safetensors"


def save(folder: Path, state: State, ticket: Ticket | None = None) -> None:
    """Writes a state, and deletes all but the NEWEST last ones.

    Args:
      folder: of the training.
      state: what to go on from.
      ticket: whose training it is, which the file tells.

    Raises:
      UserError: the file cannot be written.
    """
    variables, about = taken_apart(state)
    path = folder / f"checkpoint_{state.step:09d}.safetensors"
    whose = {"ticket": ticket.digest} if ticket else {}
    storage.write_tensors(path, variables, {"format": "checkpoint", **whose, **about})
    with storage.explained(folder):
        for old in sorted(folder.glob(_PATTERN))[:-NEWEST]:
            old.unlink()


def latest(
    folder: Path,
    say: Callable[[str], None],
    ticket: Ticket | None = None,
    stop: int | None = None,
) -> State | None:
    """Returns the last state whose file is whole; None where there is none.

    Args:
      folder: where `save` wrote.
      say: told of files that are damaged; they are deleted.
      ticket: whose training it must be (None: anybody's).
      stop: the end of that training.

    Raises:
      OtherFile: it is of another ticket's training.
      NewerFormat: a later version of this package wrote it.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            variables, about = storage.read_tensors(path)
            with storage.reading(path, "is no whole checkpoint", "it is deleted"):
                storage.require(about.pop("format", None) == "checkpoint", "it is something else")
                whose = about.pop("ticket", None)
                state = put_together(variables, about)
                _require_whole(path, state)
                if ticket and whose not in (None, ticket.digest):
                    raise storage.OtherFile(
                        f"{str(path)!r} is whole, but of the training of another ticket; put the "
                        "one back that was there, or delete it to train anew"
                    )
                if ticket:
                    _require_fits(state, ticket, stop)
            return state
        except (storage.NewerFormat, storage.OtherFile):
            raise
        except UserError as error:
            say(f"a checkpoint is damaged, going on from the one before, or anew: {error}")
            with storage.explained(path):
                path.unlink(missing_ok=True)
    return None


def _require_whole(path: Path, state: State) -> None:
    """Raises ValueError where a state contradicts itself, or its file's name."""
    named = f"checkpoint_{state.step:09d}" if storage.is_count(state.step) else ""
    storage.require(path.stem == named, f"the step {state.step!r} is not that of its name")
    since = storage.is_count(state.since) and state.since <= state.step
    storage.require(since, f"the last evaluation at step {state.since!r}")
    storage.require(storage.is_number(state.total), "the sum of losses")
    storage.require(storage.is_number(state.seconds) and state.seconds >= 0, "the seconds")
    steps = [row["step"] for row in state.rows]
    in_order = bool(steps) and all(map(storage.is_count, steps)) and steps == sorted(set(steps))
    storage.require(in_order and steps[-1] <= state.since, "the evaluations")
    storage.require(Decision.is_told_by(state.decision), f"its engine is {state.decision!r}")


def _require_fits(state: State, ticket: Ticket, stop: int | None) -> None:
    """Raises ValueError where a state cannot be one of a ticket's training."""
    start, end = ticket.rewind_step, state.step + 1 if stop is None else stop
    storage.require(start < state.step < end, f"step {state.step} is not between {start} and {end}")
    require_rows(state.rows)
    began, last = state.rows[0]["step"], state.rows[-1]["step"]
    storage.require((began, last) == (start, state.since), "evaluations of other steps")
    for name, w in ticket.weights.items():
        found = [state.variables.get(f"{own}weights/{name}") for own in ("", "replica_0/")]
        fits = [a for a in found if a is not None and a.shape == w.shape]
        storage.require(fits, f"no weights {name!r} of that shape")
    mask = ticket.mask if state.mask is None else state.mask
    shapes = ({name: m.shape for name, m in of.items()} for of in (mask, ticket.mask))
    storage.require(next(shapes) == next(shapes), "a mask of other kernels")
    for name, m in mask.items():
        pruned = state.variables[f"weights/{name}"][m == 0]
        storage.require(not np.any(pruned != 0), f"{name!r} exceeds the mask")


def taken_apart(state: State) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a state's arrays, and what else it is, JSON-ready."""
    about = dataclasses.asdict(dataclasses.replace(state, variables={}, mask=None, moves={}))
    del about["moves"]
    packed = {f"mask/{name}": masks.pack(m) for name, m in (state.mask or {}).items()}
    shapes = {name: list(m.shape) for name, m in (state.mask or {}).items()}
    packed |= {f"moves/{name}": a for name, a in state.moves.items()}
    return {**state.variables, **packed}, {**about, "rows": list(state.rows), "mask": shapes}


def put_together(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> State:
    """Returns the state that was `taken_apart`; one of format 1 has no mask."""
    mask = {
        name: masks.unpack(arrays[f"mask/{name}"], tuple(shape))
        for name, shape in (about.get("mask") or {}).items()
    }
    variables = {n: a for n, a in arrays.items() if not n.startswith(("mask/", "moves/"))}
    moves = {n.removeprefix("moves/"): a for n, a in arrays.items() if n.startswith("moves/")}
    rows, of = tuple(about["rows"]), {"variables": variables, "mask": mask or None, "moves": moves}
    return State(**{**about, "rows": rows, **of})


def clear(folder: Path) -> None:
    """Deletes the checkpoints of a training that is finished."""
    with storage.explained(folder):
        for path in folder.glob(_PATTERN):
            path.unlink()


class Asked:
    """Says whether the process was asked to end, by SIGTERM or Ctrl-C, while it was patient.

    Attributes:
      patient: whether it is.
      number: of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self._came = self.patient = False
        self.number: int | None = None

    def __call__(self) -> bool:
        """Whether it was."""
        return self._came

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Within, the process is not ended at once, for there is a state to be saved."""
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def take(self, number: int, frame: Any = None) -> None:
        """The handler of SIGTERM and SIGINT."""
        self._came, self.number = True, self.number or number
        if not self.patient:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise Interrupted("stopped by SIGTERM; what is finished is kept")


@contextlib.contextmanager
def terminations() -> Iterator[Asked]:
    """Within, SIGTERM and Ctrl-C are only noted where something is done `patiently`.

    Elsewhere SIGTERM raises Interrupted, and Ctrl-C KeyboardInterrupt, as it does at the end of
    what was done patiently. A second Ctrl-C ends the process at once.

    Raises:
      KeyboardInterrupt: Ctrl-C came; says what is kept.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield asked
        return
    mine = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored (nohup)
        mine.append(signal.SIGINT)
    before = {number: signal.signal(number, asked.take) for number in mine}
    try:
        with _second_ends(asked) if len(mine) > 1 else contextlib.nullcontext():
            yield asked
    except Interrupted as error:
        if asked.number == signal.SIGINT:
            raise KeyboardInterrupt(str(error)) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _second_ends(asked: Asked) -> Iterator[None]:
    """Within, a second SIGINT ends the process, also while TensorFlow computes.

    Handlers in Python have to wait for that; a thread that is told of signals by a pipe has not.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        came = 0
        while got := os.read(reader, 1):
            came += got[0] == signal.SIGINT
            if came == 1 and got[0] == signal.SIGINT and asked.patient:
                os.write(2, b"interrupted: the state is being saved; again, and it ends at once\n")
            if came > 1:
                if os.isatty(1):
                    os.write(1, b"\x1b[?25h")  # the cursor, which progress bars hide
                os.write(2, b"ended at once; what is finished is kept\n")
                os._exit(130)
        os.close(reader)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
