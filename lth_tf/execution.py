"""Execution: how an experiment is computed, which is no part of what it is.

Engine, compact training and threads decide about the bits of a training, or about its time, and
not about its mathematics: so they are neither in a `Spec` nor in tickets and digests, but in a
record of their own beside them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lth_tf.errors import UserError

ENGINES = ("auto", "tensorflow", "sparse")
COMPACT = ("auto", "off")


@dataclasses.dataclass(frozen=True)
class Execution:
    """What is asked for.

    Attributes:
      engine: what computes the steps: 'tensorflow' all weights, in its own graph; 'sparse' the
        kept ones alone, in compiled code (lth_tf[sparse]); 'auto' the quicker one, decided once
        for each training.
      compact_training: 'auto' leaves out of the graph what is dead, where that is quicker; 'off'.
      threads: for each operation of a training (None: as many as there are cores).
      live: whether TensorBoard logs are written at each evaluation, not at the end.

    Raises:
      UserError: an unknown choice, or less than one thread.
    """

    engine: str = "auto"
    compact_training: str = "auto"
    threads: int | None = None
    live: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("engine", ENGINES), ("compact_training", COMPACT)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(f"unknown {name} {value!r}; there are: {', '.join(choices)}")
        whole = type(self.threads) is int and self.threads >= 1
        if self.threads is not None and not whole:
            raise UserError(f"threads {self.threads!r} is out of range; give 1 or more")


WHOLE = Execution("tensorflow", "off")  # what everything was computed with before there were others


@dataclasses.dataclass(frozen=True)
class Decision:
    """How one training is computed: decided at its beginning, kept with its checkpoints.

    Attributes:
      engine: 'tensorflow' or 'sparse'.
      compact: whether what is dead is left out.
      threads: of the sparse engine; TensorFlow's are those of the process.
      why: half a sentence for the plan and the record.
    """

    engine: str = "tensorflow"
    compact: bool = False
    threads: int = 1
    why: str = ""

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Decision:
        """Returns the decision that a record tells; without one it is the graph of all weights."""
        return cls(**values) if values else cls()
