"""Execution: how an experiment is computed, which is no part of what it is.

The engine decides about the time of a training and the last bits of its numbers, and not about
its mathematics: so it is neither in a `Spec` nor in tickets and digests, but in a record of its own
beside them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from lth_tf.errors import UserError
from lth_tf.registry import nearest

# Choice -> what it is, for --help.
ENGINES = {
    "tensorflow": "all weights, in a graph of TensorFlow",
    "sparse": "the kept ones alone, in compiled code for CPUs (pip install lth_tf[sparse]), which "
    "networks of dense layers can be trained with",
    "auto": "sparse where that can be and is quicker, on machines without a GPU; decided once for "
    "each training",
}

COMPACT = {
    "auto": "where that saves more than it takes to build the smaller network; decided once for "
    "each training",
    "on": "wherever it can be done",
    "off": "never",
}


def cores() -> int:
    """Returns how many cores this process may use."""
    schedulable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(schedulable(0))


def number_of(flag: str, text: str) -> int:
    """Returns the number that is given for how many trainings are done side by side.

    Args:
      flag: what it is given by.
      text: what is given, and is not 'auto'.

    Raises:
      UserError: it is no number from 1 on.
    """
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise UserError(f"--{flag}={text} is neither a number from 1 on nor 'auto'")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Execution:
    """What is asked for.

    Attributes:
      engine: what computes the steps, a key of ENGINES; None: what the workdir was begun with,
        'tensorflow' for a new one.
      compact: whether TensorFlow trains only the channels that take part, a key of COMPACT; None:
        what the workdir was begun with, 'auto' for a new one.
      live: whether TensorBoard's logs are written at each evaluation, to be looked at meanwhile,
        and not only at checkpoints and at the end of a training.

    Raises:
      UserError: an unknown choice.
    """

    engine: str | None = None
    compact: str | None = None
    live: bool = False

    def __post_init__(self) -> None:
        for what, given, known in (
            ("engine", self.engine, ENGINES), ("compact training", self.compact, COMPACT)
        ):  # fmt: skip
            if given is not None and given not in known:
                raise UserError(
                    f"unknown {what} {given!r}; there are: {', '.join(known)}."
                    f"{nearest(str(given), list(known))}"
                )


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one training is computed: decided at its beginning, kept with its checkpoints.

    Attributes:
      engine: 'tensorflow' or 'sparse'.
      compact: whether TensorFlow trains only the channels that take part.
    """

    engine: str = "tensorflow"
    compact: bool = False

    def told(self) -> dict[str, Any]:
        """Returns a record of it."""
        if not self.compact:
            return {"engine": self.engine}
        return {"engine": self.engine, "compact": True, "left_out_statistics": "as at the start"}

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Decision:
        """Returns the decision that a record tells; without one it is the graph of all weights."""
        return cls(values["engine"], values.get("compact", False)) if values else cls()

    @staticmethod
    def is_told_by(values: Any) -> bool:
        """Says whether that can be made of a record."""
        if values is None:
            return True
        return isinstance(values, dict) and any(
            values == each.told()
            for each in (Decision(), Decision("sparse"), Decision(compact=True))
        )
