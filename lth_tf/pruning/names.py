"""Names of weights: unique paths that are the same in every process, and kinds of kernels."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from lth_tf.pruning import inside
from lth_tf.pruning.hosts import hosts_of
from lth_tf.pruning.masked import MaskedLayer


class Weight(NamedTuple):
    """A variable of a model, and how it is known.

    Attributes:
      name: a unique path, the same in every process.
      variable: the variable.
      masks: the mask variables: none, or one for each `MaskedLayer` that it is used in.
      kernel: whether it is prunable.
      owner: the layer that made it.
    """

    name: str
    variable: Any
    masks: list[Any]
    kernel: bool
    owner: Any


def named(model: Any, every: bool = False) -> list[Weight]:
    """Returns a model's own weights, then those of the layers in it, each under a unique path.

    Args:
      model: plain or pruned.
      every: whether of a pruned model what is prunable and not masked (a new head) is a
        kernel, too.
    """
    masks: dict[int, list] = {}
    for layer in inside.layers_within(model):
        if isinstance(layer, MaskedLayer):
            for kernel, mask, _ in layer.pruning_vars:
                masks.setdefault(id(kernel), []).append(mask)
    prunable = set(masks)
    if every or not masks:
        prunable |= {id(kernel) for _, _, kernel in hosts_of(model)}
    found: list[Weight] = []
    seen: set[int] = set()
    taken: set[str] = set()

    def unique(path: str) -> str:
        name, n = path, 0
        while name in taken:
            n += 1
            name = f"{path}_{n}"
        taken.add(name)
        return name

    def walk(layer: Any, path: str) -> None:
        seen.add(id(layer))
        for variable in inside.own_weights(layer):
            if id(variable) not in seen:
                seen.add(id(variable))
                name = unique(path + variable.name.split("/")[-1].split(":")[0])
                own = masks.get(id(variable), [])
                found.append(Weight(name, variable, own, id(variable) in prunable, layer))
        for child in inside.sublayers(layer):
            child = child.layer if isinstance(child, MaskedLayer) else child
            if id(child) not in seen:
                walk(child, unique(path + _segment(child)) + "/")

    walk(model, "")
    return found


def _segment(layer: Any) -> str:
    """A layer's name, without the number if Keras made it up.

    'dense_3' counts the layers of the process; here they are numbered in their order in the model.
    """
    if inside.was_named(layer):
        return layer.name
    usual = inside.automatic_name(layer)
    automatic = re.fullmatch(rf"((?:forward_|backward_)?{usual})(_\d+)?", layer.name)
    return automatic[1] if automatic else layer.name


def weights(model: Any) -> dict[str, Any]:
    """Returns all variables of a plain or pruned model, masks aside: unique path -> variable.

    Layers that nobody named ('dense_3') are numbered in their order in the
    model ('dense', 'dense_1', ...), which is the same in every process.
    """
    return {w.name: w.variable for w in named(model)}


def kernels(model: Any) -> dict[str, Any]:
    """Returns the prunable variables of a plain or pruned model: unique path -> variable.

    Prunable are the kernels of dense, convolutional, recurrent and attention layers
    (trainable attributes called 'kernel' or '..._kernel', of rank 2 or more); of a custom
    layer with a method `get_prunable_weights()`, the attributes that it returns. Biases,
    normalisation and embeddings are not, nor what a model holds without a layer, unless
    they were selected by name (`prune`). `prunable` says of each weight why.
    """
    return {w.name: w.variable for w in named(model) if w.kernel}


def kinds(model: Any) -> dict[str, str]:
    """Returns for each kernel 'conv', 'dense' or 'output' (the last one)."""
    found = [w for w in named(model) if w.kernel]
    kind = {w.name: "conv" if "Conv" in type(w.owner).__name__ else "dense" for w in found}
    if found:
        kind[found[-1].name] = "output"
    return kind
