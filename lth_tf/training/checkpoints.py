"""Checkpoints inside a training: the last two states, in files that tell whether they are whole."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf import masks, storage
from lth_tf.errors import UserError
from lth_tf.training.states import Interrupted, State

NEWEST = 2
_PATTERN = "checkpoint_*.safetensors"


def save(folder: Path, state: State) -> None:
    """Writes a state, and deletes all but the NEWEST last ones.

    Raises:
      UserError: the file cannot be written.
    """
    variables, about = taken_apart(state)
    path = folder / f"checkpoint_{state.step:09d}.safetensors"
    storage.write_tensors(path, variables, {"format": "checkpoint", **about})
    with storage.explained(folder):
        for old in sorted(folder.glob(_PATTERN))[:-NEWEST]:
            old.unlink()


def latest(folder: Path, say: Callable[[str], None]) -> State | None:
    """Returns the last state whose file is whole; None where there is none.

    Args:
      folder: where `save` wrote.
      say: told of files that are damaged; they are deleted.

    Raises:
      NewerFormat: a later version of this package wrote it.
    """
    for path in sorted(folder.glob(_PATTERN), reverse=True):
        try:
            variables, about = storage.read_tensors(path)
            if about.pop("format", None) != "checkpoint":
                raise UserError(f"{str(path)!r} is not a checkpoint")
            return put_together(variables, about)
        except storage.NewerFormat:
            raise
        except (UserError, KeyError, TypeError, ValueError) as error:
            say(f"a checkpoint is damaged, going on from the one before, or anew: {error}")
            with storage.explained(path):
                path.unlink(missing_ok=True)
    return None


def taken_apart(state: State) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns a state's arrays, and what else it is, JSON-ready."""
    about = dataclasses.asdict(dataclasses.replace(state, variables={}, mask=None))
    packed = {f"mask/{name}": masks.pack(m) for name, m in (state.mask or {}).items()}
    shapes = {name: list(m.shape) for name, m in (state.mask or {}).items()}
    return {**state.variables, **packed}, {**about, "rows": list(state.rows), "mask": shapes}


def put_together(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> State:
    """Returns the state that was `taken_apart`; one of format 1 has no mask."""
    mask = {
        name: masks.unpack(arrays[f"mask/{name}"], tuple(shape))
        for name, shape in (about.get("mask") or {}).items()
    }
    variables = {name: a for name, a in arrays.items() if not name.startswith("mask/")}
    rows = tuple(about["rows"])
    return State(**{**about, "rows": rows, "variables": variables, "mask": mask or None})


def clear(folder: Path) -> None:
    """Deletes the checkpoints of a training that is finished."""
    with storage.explained(folder):
        for path in folder.glob(_PATTERN):
            path.unlink()


class Asked:
    """Says whether the process was asked to end, by SIGTERM, while it was patient."""

    def __init__(self) -> None:
        self._came = self._patient = False

    def __call__(self) -> bool:
        """Whether it was."""
        return self._came

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        """Within, the process is not ended at once, for there is a state to be saved."""
        self._patient = True
        try:
            yield
        finally:
            self._patient = False

    def take(self, *_: Any) -> None:
        """The handler of SIGTERM."""
        self._came = True
        if not self._patient:
            raise Interrupted("stopped by SIGTERM; what is finished is kept")


@contextlib.contextmanager
def terminations() -> Iterator[Asked]:
    """Within, SIGTERM raises Interrupted; where something is done `patiently` it is only noted."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():  # where Python has no signals
        yield asked
        return
    before = signal.signal(signal.SIGTERM, asked.take)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
