"""Which layers hold kernels, and under which attributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lth_tf.compat import PruneLowMagnitude, keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside


def choice_of(layer: Any) -> list[list[Any]]:
    """Returns [position among the layers within, attributes] of what `prune` selected by name."""
    within = enumerate(inside.layers_within(layer))
    return [[i, sorted(x._chosen)] for i, x in within if vars(x).get("_chosen") is not None]


def choose(layer: Any, choice: Sequence[Sequence[Any]] | None) -> None:
    """Has layers remember which attributes are prunable, in the place of the names' rule.

    Args:
      layer: that holds the layers.
      choice: as `choice_of` returns it; None leaves all as it is.
    """
    within = inside.layers_within(layer)
    for i, attributes in choice or ():
        if i < len(within):
            inside.set_untracked(within[i], "_chosen", frozenset(attributes))


def hosts_of(layer: Any) -> list[tuple[Any, str, Any]]:
    """Returns (owner, attribute, variable) of all kernels that a layer and its sublayers hold.

    Not those that a model holds itself: models are not wrapped, their layers are.
    """
    owners = [
        x
        for x in inside.layers_within(layer)
        if not isinstance(x, (keras.Model, PruneLowMagnitude))
    ]
    chosen = {id(x): x._chosen for x in owners if vars(x).get("_chosen") is not None}
    choosy = [x for x in owners if hasattr(x, "get_prunable_weights") and id(x) not in chosen]
    named = {id(v): (x, v) for x in choosy for v in x.get_prunable_weights()}
    held = [
        (owner, attribute, value)
        for owner in owners
        for attribute, value in vars(owner).items()
        if isinstance(value, tf.Variable)
    ]
    found = [
        (owner, attribute, value)
        for owner, attribute, value in held
        if id(value) in named
        or attribute in chosen.get(id(owner), ())
        or (
            not any(owner is x for x in choosy)
            and id(owner) not in chosen
            and attribute.endswith("kernel")
            and value.trainable
            and len(value.shape) >= 2
        )
    ]
    for owner, variable in named.values():
        if not any(variable is v for _, _, v in found):
            raise UserError(
                f"layer {owner.name!r} names {variable.name} in get_prunable_weights(), but no "
                "layer has it as an attribute (self.w = self.add_weight(...)), as pruning needs"
            )
    # Other attributes with the same variable are read as well as the first.
    ids = {id(value) for _, _, value in found}
    seen = {(id(owner), attribute) for owner, attribute, _ in found}
    aliases = [h for h in held if id(h[2]) in ids and (id(h[0]), h[1]) not in seen]
    return [*found, *aliases]
