"""FLOPs relative to the dense network, as Evci et al. 2020 ("Rigging the lottery") count them.

Counted are the multiply-adds of kernels: of each weight as many as its layer puts out positions of
a channel. Biases, normalisations and activations are left out. Appendix H there: a step of training
costs three passes, forward, backward to inputs, and backward to weights.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lth_tf import pruning
from lth_tf.dynamic import METHODS
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import calls_of, is_graph_network, own_weights
from lth_tf.recipes import RECIPES, sparse
from lth_tf.spec import Spec


def positions(model: Any) -> dict[str, int]:
    """Returns kernel name -> multiply-adds of each of its weights for an example.

    Args:
      model: a plain or pruned model that is a graph of layers.

    Raises:
      UserError: it is no such model.
    """
    if not is_graph_network(model):
        raise UserError(
            f"model {model.name!r} is no graph of layers, so that it does not tell which sizes its "
            "layers put out; FLOPs are counted of functional and Sequential models"
        )
    names = {id(v): name for name, v in pruning.kernels(model).items()}
    found = dict.fromkeys(names.values(), 0)
    for layer, _, shape in calls_of(model):
        inner = pruning.inner_layer(layer)
        for variable in own_weights(inner):
            if id(variable) in names:  # a layer that is called twice computes twice
                found[names[id(variable)]] += math.prod(n or 1 for n in shape[1:-1])
    return found


def inference(model: Any, mask: Mask) -> float:
    """Returns the FLOPs of a masked network over those of the dense one.

    Args:
      model: see `positions`.
      mask: kernel name -> 0/1 array.

    Raises:
      UserError: see `positions`; or the mask is of another network.
    """
    each = positions(model)
    pruning.fit(mask, {n: tuple(v.shape) for n, v in pruning.kernels(model).items()}, "mask")
    kept = sum(each[name] * int(np.count_nonzero(m)) for name, m in mask.items())
    return kept / sum(each[name] * m.size for name, m in mask.items())


def training(spec: Spec, share: float, initial: float | None = None) -> float:
    """Returns the FLOPs of a ticket's training over those of the dense network's.

    A step takes 3 f, where f is `share`. A step that moves the mask by gradient takes 2 f + 1 in
    its place, or besides where it also trains; with growth by momentum each step takes 2 f + 1.
    While the density falls, f falls with it.

    Args:
      spec: the experiment.
      share: `inference` of the network that training ends with.
      initial: of the one that it begins with, where the density falls.
    """
    first, end = (0, spec.train_steps) if spec.recipe != "imp" else spec.retrain_span
    steps = end - first
    if not RECIPES[spec.recipe].moves(spec):
        return 3 * share * steps / (3 * spec.train_steps)
    course, method = sparse.course(spec), METHODS[spec.method]
    total, f = 0.0, share if initial is None else initial
    for step in range(steps):
        due = course.due(step)
        whole = 2 * f + 1
        if method.grow == "momentum":
            total += whole
        elif due and method.looks:
            total += whole + (3 * f if spec.update_trains else 0)
        else:
            total += 3 * f
        if due and initial is not None:
            f = course.density(step, initial, share)
    return total / (3 * spec.train_steps)
