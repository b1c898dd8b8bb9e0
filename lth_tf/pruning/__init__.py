"""Masks that hold: `prune` wraps a model's prunable layers so that pruned weights stay 0.0."""

from lth_tf.pruning.models import (
    InvariantError,
    MaskedLayer,
    assign,
    check,
    create_slots,
    fit,
    get_mask,
    inner_optimizer,
    is_pruned,
    kernels,
    kinds,
    masks_set,
    plain,
    prune,
    require_maskable,
    require_model,
    set_mask,
    slots_of,
    strip,
    weights,
)

__all__ = [
    "InvariantError", "MaskedLayer", "assign", "check", "create_slots", "fit", "get_mask",
    "inner_optimizer", "is_pruned", "kernels", "kinds", "masks_set", "plain", "prune",
    "require_maskable", "require_model", "set_mask", "slots_of", "strip", "weights",
]  # fmt: skip
