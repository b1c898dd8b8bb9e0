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
      live: whether TensorBoard's logs are written at each evaluation, to be looked at meanwhile,
        and not only at checkpoints and at the end of a training.

    Raises:
      UserError: an unknown choice.
    """

    engine: str | None = None
    live: bool = False

    def __post_init__(self) -> None:
        if self.engine is not None and self.engine not in ENGINES:
            raise UserError(
                f"unknown engine {self.engine!r}; there are: {', '.join(ENGINES)}."
                f"{nearest(str(self.engine), list(ENGINES))}"
            )


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one training is computed: decided at its beginning, kept with its checkpoints.

    Attributes:
      engine: 'tensorflow' or 'sparse'.
    """

    engine: str = "tensorflow"

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Decision:
        """Returns the decision that a record tells; without one it is the graph of all weights."""
        return cls(**values) if values else cls()

    @staticmethod
    def is_told_by(values: Any) -> bool:
        """Says whether that can be made of a record."""
        if values is None:
            return True
        whole = isinstance(values, dict) and values.keys() == {"engine"}
        return whole and values["engine"] in ("tensorflow", "sparse")
