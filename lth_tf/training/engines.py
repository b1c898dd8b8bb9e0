"""Engines: what computes the steps of a training, and which one does it for a mask."""

from __future__ import annotations

from typing import Any

from lth_tf.execution import Decision, Execution
from lth_tf.masks import Mask
from lth_tf.models import Weights
from lth_tf.training.graph import Graph, Setup


class Engines:
    """The engines of one trainer, each made when it is first needed.

    Args:
      setup: what trains.
      execution: what is asked for.
    """

    def __init__(self, setup: Setup, execution: Execution):
        self._setup, self._execution = setup, execution
        self._graph = Graph(setup)

    def choose(self, mask: Mask, weights: Weights) -> Decision:
        """Returns how a training is computed, once and for all of it.

        Args:
          mask: kernel name -> 0/1 array, that it begins with.
          weights: path -> array, all weights that it begins with.
        """
        return Decision()

    def of(self, decision: Decision) -> Any:
        """Returns the engine that a decision names."""
        return self._graph
