"""Masks that hold: `prune` wraps a model's prunable layers so that pruned weights stay 0.0."""

from lth_tf.pruning.masked import InvariantError, MaskedLayer, dense_gradients, inner_layer
from lth_tf.pruning.models import (
    assign,
    check,
    fit,
    get_mask,
    is_pruned,
    mask_variables,
    masks_set,
    note,
    optimizers_of,
    plain,
    prune,
    require_model,
    set_mask,
    slots_of,
    strip,
)
from lth_tf.pruning.names import kernels, kinds, weights
from lth_tf.pruning.selection import Prunable, prunable
from lth_tf.pruning.slots import create_slots, inner_optimizer, require_maskable

__all__ = [
    "InvariantError", "MaskedLayer", "Prunable", "assign", "check", "create_slots",
    "dense_gradients", "fit", "get_mask", "inner_layer", "inner_optimizer", "is_pruned", "kernels",
    "kinds",
    "mask_variables", "masks_set", "note", "optimizers_of", "plain", "prunable", "prune",
    "require_maskable", "require_model", "set_mask", "slots_of", "strip", "weights",
]  # fmt: skip
