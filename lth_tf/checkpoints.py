"""Checkpoints inside a training: the last two states, in files that tell whether they are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from lth_tf import storage
from lth_tf.errors import UserError
from lth_tf.training import State

KEPT = 2
_PATTERN = "checkpoint_*.safetensors"


def save(folder: Path, state: State) -> None:
    """Writes a state, and deletes all but the last KEPT.

    Raises:
      UserError: the file cannot be written.
    """
    about = dataclasses.asdict(dataclasses.replace(state, variables={}))
    about["rows"] = list(about["rows"])
    path = folder / f"checkpoint_{state.step:09d}.safetensors"
    storage.write_tensors(path, state.variables, {"format": "checkpoint", **about})
    with storage.explained(folder):
        for old in sorted(folder.glob(_PATTERN))[:-KEPT]:
            old.unlink()


def latest(folder: Path, say: Callable[[str], None]) -> State | None:
    """Returns the last state whose file is whole; None where there is none.

    Args:
      folder: where `save` wrote.
      say: told of files that are damaged; they are deleted.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            variables, about = storage.read_tensors(path)
            if about.pop("format", None) != "checkpoint":
                raise UserError(f"{str(path)!r} is not a checkpoint")
            about["rows"] = tuple(about["rows"])
            return State(**{**about, "variables": variables})
        except UserError as error:
            say(f"a checkpoint is damaged, going on from the one before, or anew: {error}")
            path.unlink(missing_ok=True)
    return None


def clear(folder: Path) -> None:
    """Deletes the checkpoints of a training that is finished."""
    with storage.explained(folder):
        for path in folder.glob(_PATTERN):
            path.unlink()


@contextlib.contextmanager
def terminations() -> Iterator[Callable[[], bool]]:
    """Within, SIGTERM does not end the process; yields a function that says whether it came."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield asked.is_set
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
