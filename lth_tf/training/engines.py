"""Engines: what computes the steps of a training, and which one does it for a mask."""

from __future__ import annotations

from typing import Any

from lth_tf import masks
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.masks import Mask
from lth_tf.training import sparse
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
        self._made: dict[Decision, Any] = {Decision(): Graph(setup)}
        if self._asked == "sparse":
            self._require_sparse("engine=sparse cannot train this")

    def _require_sparse(self, what: str) -> None:
        if why := sparse.unfit(self._setup):
            raise UserError(f"{what}: {why}; or use --engine=tensorflow in a workdir of its own")

    def told(self) -> str:
        """Returns a sentence for the plan, or '' where TensorFlow computes everything."""
        if self._asked == "sparse":
            return "the sparse engine trains all networks, kept weights alone"
        if self._asked == "auto":
            if _gpu():
                return "TensorFlow trains all networks, on the GPU"
            if why := sparse.unfit(self._setup):
                return f"TensorFlow trains all networks, the sparse engine cannot: {why}"
            return f"the sparse engine trains networks of density {BREAK_EVEN:g} and below"
        return ""

    def choose(self, mask: Mask) -> Decision:
        """Returns how a training is computed, once and for all of it.

        Args:
          mask: kernel name -> 0/1 array, that it begins with.
        """
        quicker = (
            masks.density(mask) <= BREAK_EVEN and not _gpu() and sparse.unfit(self._setup) is None
        )
        if self._asked == "sparse" or (self._asked == "auto" and quicker):
            return Decision("sparse")
        return Decision()

    def of(self, decision: Decision) -> Any:
        """Returns the engine that a decision names.

        Raises:
          UserError: it was made on another machine, where this could be computed.
        """
        if decision not in self._made:
            self._require_sparse("this training was begun with the sparse engine")
            self._made[decision] = sparse.Sparse(self._setup)
        return self._made[decision]


def _gpu() -> bool:
    return bool(tf.config.list_logical_devices("GPU"))
