"""A second wall behind `MaskedLayer`: constraints, which optimizers apply after every update.

The first wall masks gradients where a layer is called through its `MaskedLayer`. A kernel can be
read past it: by a tied layer, by a function that remembers the layer, through another attribute.
Then its gradients at pruned weights are not zero; but Keras applies a variable's constraint after
every update, and this one puts mask x kernel, and mask x slots, back. Where the first wall holds it
changes no bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from lth_tf.compat import tf
from lth_tf.pruning import inside
from lth_tf.pruning.slots import require_maskable, slots_for


class Wall:
    """variable -> mask x the constraint that it had, for a kernel.

    Args:
      kernel: the variable.
      before: the constraint that it had, or None.

    Attributes:
      masks: the variables of all masks that are in force for it.
    """

    def __init__(self, kernel: Any, before: Callable[[Any], Any] | None):
        self.kernel, self.before = kernel, before
        self.masks: list[Any] = []
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, variable: Any) -> Any:
        """Returns the variable's new value, and cleans the slots of the optimizer that asks."""
        value = self._masked(variable.read_value())
        if self.before is not None:
            value = self._masked(tf.convert_to_tensor(self.before(value)))
        optimizer = inside.optimizer_at_work()
        if optimizer is not None:
            if optimizer not in self._seen:  # may be another than the one set_mask looked at
                require_maskable(optimizer)
                self._seen.add(optimizer)
            for slot in slots_for(optimizer, self.kernel):
                slot.assign(self._masked(slot.read_value()))
        return value

    def _masked(self, value: Any) -> Any:
        for mask in self.masks:
            value = tf.where(mask != 0, value, tf.zeros([], value.dtype))
        return value


def wall_of(kernel: Any) -> Wall | None:
    """Returns the wall of a kernel, if it has one."""
    return kernel.constraint if isinstance(kernel.constraint, Wall) else None


def put_up(kernel: Any, mask: Any) -> None:
    """Puts a kernel behind a wall; a second mask joins the first.

    Args:
      kernel: the variable.
      mask: the variable of its mask.
    """
    wall = wall_of(kernel)
    if wall is None:
        wall = Wall(kernel, kernel.constraint)
        inside.constrain(kernel, wall)
    if not any(mask is known for known in wall.masks):
        wall.masks.append(mask)


def take_down(kernels: Iterable[Any]) -> None:
    """Gives kernels back the constraints that they had."""
    for kernel in kernels:
        if wall := wall_of(kernel):
            inside.constrain(kernel, wall.before)
