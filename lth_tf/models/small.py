"""Small dense networks: the baseline that a sparse network of as many weights has to beat."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re

from lth_tf import pruning
from lth_tf.errors import UserError
from lth_tf.models import MODELS, plain_model
from lth_tf.spec import Spec


def narrower(spec: Spec, factor: float) -> Spec:
    """Returns a spec whose network has `factor` times as many channels and units in each layer.

    Raises:
      UserError: the network comes in one size.

    >>> narrower(Spec(model="lenet_300_100"), 0.1).model
    'lenet_30_10'
    """
    name = MODELS.about(spec.model).sized or spec.model
    if re.fullmatch(r"lenet5?(_[1-9]\d*)+", name):
        head, *sizes = name.split("_")
        less = [str(max(1, round(factor * int(n)))) for n in sizes]
        return dataclasses.replace(spec, model="_".join([head, *less]))
    if "width" in inspect.signature(MODELS[spec.model]).parameters:
        return dataclasses.replace(spec, width=factor * spec.width)
    raise UserError(
        f"model {spec.model!r} comes in one size; small dense networks there are of the families "
        "lenet_A_B_... and lenet5_A_B_C_... and of models with a width"
    )


def matched(spec: Spec, input_shape: tuple[int, ...], classes: int, density: float) -> Spec:
    """Returns the spec of a network, narrower throughout, with as many weights as a sparse one.

    Weights are those of kernels. Of all factors found by halving the one that comes nearest.

    Args:
      spec: of the network that would be pruned.
      input_shape, classes: of the data set.
      density: 0 to 1, of the sparse network.

    Raises:
      UserError: see `narrower`; or the density is none.
    """
    if not 0 < density < 1:
        raise UserError(f"small_dense {density:g} is out of range; it must lie between 0 and 1")
    counted: dict[Spec, int] = {}

    def count(each: Spec) -> int:
        if each not in counted:
            model = plain_model(each, input_shape, classes, 0)
            counted[each] = sum(math.prod(v.shape) for v in pruning.kernels(model).values())
        return counted[each]

    wanted, low, high = density * count(spec), 0.0, 1.0
    tried: list[Spec] = []
    for _ in range(14):
        middle = (low + high) / 2
        tried.append(narrower(spec, round(middle, 4)))
        low, high = (middle, high) if count(tried[-1]) < wanted else (low, middle)
    found = min(tried, key=lambda each: abs(count(each) - wanted))
    if found.width == spec.width:  # few units are rounded far: the widest layer makes up for it
        head, *sizes = found.model.split("_")
        units = [int(n) for n in sizes]
        widest = units.index(max(units))
        for n in range(units[widest] * 4 // 5, units[widest] * 5 // 4 + 2):
            sizes[widest] = str(max(1, n))
            tried.append(dataclasses.replace(spec, model="_".join([head, *sizes])))
        found = min(tried, key=lambda each: abs(count(each) - wanted))
    return found
