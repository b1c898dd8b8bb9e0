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
from lth_tf.analysis.summary import FLOPS
from lth_tf.compat import keras
from lth_tf.dynamic import METHODS
from lth_tf.errors import UserError
from lth_tf.masks import Mask
from lth_tf.pruning.inside import calls_of, is_graph_network, layers_within, own_weights
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
        for variable in (v for part in layers_within(inner) for v in own_weights(part)):
            if id(variable) in names:  # a layer that is called twice computes twice
                steps = inner.input_shape[1:2] if isinstance(inner, keras.layers.RNN) else ()
                found[names[id(variable)]] += math.prod(n or 1 for n in steps or shape[1:-1])
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


def training(
    spec: Spec, share: float, initial: float | None = None, steps: int | None = None
) -> float:
    """Returns the FLOPs of a ticket's training over those of the dense network's.

    A step takes 3 f, where f is `share`. A step that moves the mask by gradient takes 2 f + 1 in
    its place, or besides where it also trains; with growth by momentum each step takes 2 f + 1.
    While the density falls, f falls with it.

    Args:
      spec: the experiment.
      share: `inference` of the network that training ends with.
      initial: of the one that it begins with, where the density falls.
      steps: how many it has; by default those of a whole training.
    """
    steps = spec.train_steps if steps is None else steps
    if not RECIPES[spec.recipe].moves(spec):
        return share * steps / spec.train_steps
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


def published(share: float, every: int) -> float:
    """Returns the training FLOPs over the dense network's by which RigL's tables go.

    (3 f dT + 2 f + 1) / (3 (dT + 1)): updates until the end, each besides dT steps that train
    (Evci et al. 2020, appendix H). `training` counts what the loop does.

    Args:
      share: f, see `inference`.
      every: dT, steps between updates.
    """
    return (3 * share * every + 2 * share + 1) / (3 * (every + 1))


def of_training(
    model: Any, spec: Spec, level: int, first: Mask, last: Mask, steps: int
) -> dict[str, float]:
    """Returns what summary.csv tells of a training's FLOPs, nothing where they cannot be counted.

    Args:
      model: see `positions`.
      spec: the experiment.
      level: of the ticket.
      first, last: kernel name -> 0/1 array, that it begins and ends with; only counts matter.
      steps: of the training.
    """
    if not is_graph_network(model):
        return {}
    share = inference(model, last)
    if level == 0:  # the dense network, whose mask stays
        all_of_it = share * steps / spec.train_steps
    else:
        falls = METHODS[spec.method].falls
        begins = inference(model, first) if falls else None
        all_of_it = training(spec, share, begins, steps)
    return dict(zip(FLOPS, (share, all_of_it), strict=True))
