"""Engines: what computes the steps of a training, and which one does it for a mask."""

from __future__ import annotations

from typing import Any

from lth_tf import masks
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.masks import Mask
from lth_tf.training import compact, sparse
from lth_tf.training.graph import Graph, Setup

BREAK_EVEN = 0.2  # density from which on the sparse engine is quicker, see docs/measured.md


class Engines:
    """The engines of one trainer, each made when it is first needed.

    Args:
      setup: what trains.
      execution: what is asked for.

    Raises:
      UserError: an engine is asked for that cannot train this; says why.
    """

    def __init__(self, setup: Setup, execution: Execution):
        self._setup, self._asked = setup, execution.engine or "tensorflow"
        self._compact = execution.compact or "auto"
        self._made: dict[Decision, Any] = {Decision(): Graph(setup)}
        self._start: dict[str, Any] = {}
        if self._asked == "sparse":
            self._require_sparse("engine=sparse cannot train this")
            if self._compact == "on":
                raise UserError(
                    "compact_training=on is for --engine=tensorflow or auto: the sparse engine "
                    "trains kept weights alone anyway"
                )
        elif self._compact == "on" and (why := compact.unfit(setup)):
            raise UserError(f"compact_training=on does not work here: {why}; use auto or off")

    def _require_sparse(self, what: str) -> None:
        if why := sparse.unfit(self._setup):
            raise UserError(f"{what}: {why}; or use --engine=tensorflow in a workdir of its own")

    def told(self) -> str:
        """Returns what there is to say in a plan of how trainings are computed, or ''."""
        if self._asked == "sparse":
            return "the sparse engine trains all networks, kept weights alone"
        if self._asked == "auto":
            if _gpu():
                return "TensorFlow trains all networks, on the GPU"
            if why := sparse.unfit(self._setup):
                return f"TensorFlow trains all networks, the sparse engine cannot: {why}"
            return f"the sparse engine trains networks of density {BREAK_EVEN:g} and below"
        if self._compact != "off" and (why := compact.unfit(self._setup)):
            return f"TensorFlow trains whole networks, compact training does not work here: {why}"
        return ""

    def look(self) -> None:
        """Takes note of how a training begins; called while the model has those weights."""
        self._start = compact.start_of(self._setup.model)

    def choose(self, mask: Mask, steps: int) -> Decision:
        """Returns how a training is computed, once and for all of it.

        Args:
          mask: kernel name -> 0/1 array, that it begins with.
          steps: how many it is to do.
        """
        quicker = (
            masks.density(mask) <= BREAK_EVEN and not _gpu() and sparse.unfit(self._setup) is None
        )
        if self._asked == "sparse" or (self._asked == "auto" and quicker):
            return Decision("sparse")
        small = Decision(compact=True)
        if self._compact == "off" or compact.unfit(self._setup):
            return Decision()
        pays = self._compact == "on" or (
            masks.density(mask) < 1 and self.of(small).pays(mask, steps)
        )
        return small if pays else Decision()

    def of(self, decision: Decision) -> Any:
        """Returns the engine that a decision names.

        Raises:
          UserError: it was made on another machine, where this could be computed.
        """
        if decision not in self._made:
            if decision.compact:
                if why := compact.unfit(self._setup):
                    raise UserError(f"this training was begun as a compact one, and here {why}")
                self._made[decision] = compact.Compact(self._setup, self._start)
            else:
                self._require_sparse("this training was begun with the sparse engine")
                self._made[decision] = sparse.Sparse(self._setup)
        if decision.compact:
            self._made[decision].look(self._start)
        return self._made[decision]


def _gpu() -> bool:
    return bool(tf.config.list_logical_devices("GPU"))
