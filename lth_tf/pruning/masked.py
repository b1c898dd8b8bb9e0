"""A layer that computes with mask x kernel.

In its `call` the layer inside sees mask x kernel instead of the kernel. The gradient of any
loss is then masked by the chain rule, so that a pruned weight whose optimizer slots are zero
stays exactly zero.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lth_tf.compat import PruneLowMagnitude, keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import inside, walls
from lth_tf.pruning.hosts import choice_of, choose, hosts_of


class InvariantError(RuntimeError):
    """A weight or optimizer slot is not zero where the mask is, or another mask is in force."""


keras.saving.get_custom_objects().pop("lth_tf>MaskedLayer", None)  # what stood for it until now


@keras.saving.register_keras_serializable(package="lth_tf")
class MaskedLayer(PruneLowMagnitude):
    """A layer that computes with mask x kernel.

    Keeps the variables and the interface of tfmot's `PruneLowMagnitude` (so that
    `strip_pruning`, `prune_scope`, `PruningSummaries` and saving work) but not its
    engine: the mask changes only when `set_mask` changes it.

    Args:
      layer: any layer; all kernels that it or its sublayers hold are masked.
      masks: the kernels' shapes.
      wall: whether to hold the kernels by constraints, too; see `walls`.

    Attributes:
      pruning_vars: list of (kernel, mask, threshold) variables; the mask has the
        kernel's shape and holds 0 or 1, the threshold is always 0.
    """

    def __init__(
        self, layer: Any, masks: Sequence[Sequence[int]], wall: bool = True, **kwargs: Any
    ):
        kwargs["name"] = f"masked_{layer.name}"
        kwargs.setdefault("dtype", layer.dtype_policy)
        # tfmot's own __init__ would refuse layers that it does not know.
        super(PruneLowMagnitude, self).__init__(layer, **kwargs)
        inside.treat_alike(self, layer)
        self.supports_masking = layer.supports_masking
        # The kernels belong to the layer and are saved with it.
        inside.set_untracked(self, "_shapes", [tuple(shape) for shape in masks])
        inside.set_untracked(self, "pruning_vars", [])
        inside.set_untracked(self, "_hosts", [])
        inside.set_untracked(self, "_wall", wall)
        inside.set_untracked(self, "_noted", None)
        inside.set_untracked(self, "_chosen", None)

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer where that is still to be done, and the mask variables."""
        super(PruneLowMagnitude, self).build(input_shape)
        # h5 wants names that are unique in a model; checkpoints, which want them to be the same
        # in every process, do not see the scope.
        with tf.name_scope(self.name):
            self.pruning_step = self.add_weight(
                "pruning_step",
                initializer=keras.initializers.Constant(-1),
                dtype=tf.int64,
                trainable=False,
            )
            made = [
                [
                    self.add_weight(
                        name if i == 0 else f"{name}_{i}",
                        size,
                        initializer=initial,
                        trainable=False,
                        aggregation=tf.VariableAggregation.MEAN,
                        experimental_autocast=False,
                    )
                    for name, size, initial in (("mask", shape, "ones"), ("threshold", (), "zeros"))
                ]
                for i, shape in enumerate(self._shapes)
            ]
        inside.set_untracked(self, "_masks", made)
        self._join()

    def _join(self) -> None:
        """Joins the masks with their kernels, if the kernels exist."""
        choose(self.layer, self._chosen)
        hosts = hosts_of(self.layer)
        kernels = list({id(kernel): kernel for _, _, kernel in hosts}.values())
        if [tuple(kernel.shape) for kernel in kernels] == self._shapes:
            self.pruning_vars += [(k, *m) for k, m in zip(kernels, self._masks, strict=True)]
            masks = {id(kernel): mask for kernel, mask, _ in self.pruning_vars}
            self._hosts += [(*host, masks[id(host[-1])]) for host in hosts]
            self.put_up_walls()

    def put_up_walls(self) -> None:
        """Has optimizers put mask x kernel back after each update, unless that was not wanted."""
        for kernel, mask, _ in self.pruning_vars if self._wall else ():
            walls.put_up(kernel, mask)

    def note(self) -> None:
        """Remembers the masks where what Keras saves and restores does not reach them."""
        noted = [np.packbits(mask.numpy() != 0) for _, mask, _ in self.pruning_vars]
        inside.set_untracked(self, "_noted", noted)

    @property
    def noted(self) -> bool:
        """Whether a mask was put in force."""
        return self._noted is not None

    def require_noted(self) -> None:
        """Raises InvariantError if the masks are not those that were put in force."""
        if self._noted is None:
            return
        for (kernel, mask, _), noted in zip(self.pruning_vars, self._noted, strict=True):
            now = mask.numpy() != 0
            if not np.array_equal(np.packbits(now), noted):
                was = int(np.unpackbits(noted).sum())
                raise InvariantError(
                    f"the mask of {kernel.name} is not the one that set_mask put in force: it "
                    f"keeps {int(now.sum())} of {now.size} weights instead of {was}; old masks "
                    "come back with old weights (set_weights, load_weights, callbacks that "
                    "restore): go back to weights under a mask with Rewind(weights, mask), keep "
                    "the best of the last density with callbacks.Best, or accept the mask that "
                    "the model has with set_mask(model, get_mask(model))"
                )

    @contextlib.contextmanager
    def _masked(self) -> Iterator[None]:
        """Within, the owners' kernels are mask x kernel, in the dtype they compute in."""
        masked = []
        try:
            for owner, attribute, kernel, mask in self._hosts:
                value = select(mask, kernel)
                if _DENSE.get():
                    whole = kernel.read_value()
                    value = whole + tf.stop_gradient(value - whole)
                if inside.casts_itself(kernel):
                    value = tf.cast(value, owner.compute_dtype)
                inside.set_untracked(owner, attribute, value)
                masked.append((owner, attribute, value))
            yield
            if any(vars(owner)[attribute] is not value for owner, attribute, value in masked):
                raise UserError(
                    f"layer {self.layer.name!r} waits for the other replicas in the middle of its "
                    "call (synchronized BatchNormalization?), which mixes up their masked kernels; "
                    "make it a keras.Model, so that its layers are masked one by one"
                )
        finally:
            for owner, attribute, kernel, _ in self._hosts:
                inside.set_untracked(owner, attribute, kernel)

    @inside.unread
    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer on masked kernels."""
        if not self._hosts:
            # A loaded layer may make its sublayers' kernels in its first call.
            inside.call_of(self.layer)(*args, **kwargs)
            self._join()
        _mask_regularizers(self._hosts)
        try:
            with self._masked():
                outputs = inside.call_of(self.layer)(*args, **kwargs)
        except AttributeError as error:
            if "no attribute 'assign" not in str(error):
                raise
            raise UserError(
                f"layer {self.layer.name!r} writes to its kernel in its call, past the mask (a "
                "weight normalisation?), so it cannot be pruned; compute the value that the call "
                "uses without an assign, or leave the layer out of what is pruned (select=)"
            ) from error
        inside.add_activity_loss(self.layer, outputs)
        return outputs

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Delegates Keras' sequence masking, which has nothing to do with pruning."""
        return self.layer.compute_mask(inputs, mask)

    def reset_states(self) -> None:
        """Delegates to a stateful recurrent layer."""
        self.layer.reset_states()

    @property
    def pruning_obj(self) -> Any:
        """What tfmot's UpdatePruningStep callback calls at the end of an epoch."""
        return self

    def weight_mask_op(self) -> None:
        """Zeroes the pruned weights, which they are anyway."""
        for kernel, mask, _ in self.pruning_vars:
            kernel.assign(select(mask, kernel))

    def save_own_variables(self, store: Any) -> None:
        """Saves the masks, if they are those that were put in force."""
        self.require_noted()
        super().save_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration; the masks are variables and saved as such."""
        self.require_noted()
        config = super(PruneLowMagnitude, self).get_config()
        config["masks"] = [list(shape) for shape in self._shapes]
        if inside.was_named(self.layer):
            config["named"] = True
        if chosen := choice_of(self.layer):
            config["chosen"] = chosen
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> MaskedLayer:
        """Returns the layer that `get_config` described."""
        layer = dict(config["layer"])
        # From h5 and SavedModel Keras looks for registered classes under this key.
        layer["class_name"] = layer.get("registered_name") or layer["class_name"]
        layer = keras.layers.deserialize(layer, custom_objects)
        rest = {k: v for k, v in config.items() if k not in ("named", "chosen", "layer")}
        if config.get("named"):
            inside.set_untracked(layer, "_named", True)
        masked = cls(layer, **rest)
        inside.set_untracked(masked, "_chosen", config.get("chosen"))
        return masked


_DENSE: contextvars.ContextVar[bool] = contextvars.ContextVar("dense", default=False)


@contextlib.contextmanager
def dense_gradients() -> Iterator[None]:
    """Within, gradients of kernels are those of the plain model: of pruned weights, too.

    Outputs are the same, for pruned weights are zero: kernel + (mask x kernel - kernel), of which
    the second part counts as a constant. The loop in which a mask is to grow asks for it.
    """
    token = _DENSE.set(True)
    try:
        yield
    finally:
        _DENSE.reset(token)


def select(mask: Any, kernel: Any) -> Any:
    """Returns mask x kernel; by a selection, because a product keeps NaN and -0.0."""
    value = kernel.read_value()
    return tf.where(mask != 0, value, tf.zeros([], value.dtype))


_ELEMENTWISE = (keras.regularizers.L1, keras.regularizers.L2, keras.regularizers.L1L2)


def _mask_regularizers(hosts: list[tuple]) -> None:
    """Makes weight regularizers see the masked kernel.

    On the raw one some (orthogonality, for one) have gradients at pruned weights. Done
    at every call, because `unwrap` undoes it for the plain model, which shares the layers.
    """
    for owner, _, kernel, mask in hosts:
        losses = inside.weight_losses(owner)
        for i, loss in enumerate(losses):
            inner = inside.regularization(loss)
            if inner is None or not any(a is kernel for a in inner.args):
                continue
            regularizer = inside.regularizer_of(inner)
            if type(regularizer) not in _ELEMENTWISE and loss.func is not _masked_loss:
                masked = functools.partial(_masked_loss, inner, mask, kernel)
                masked.plain = loss  # type: ignore[attr-defined]
                losses[i] = masked


def _masked_loss(inner: functools.partial, mask: Any, kernel: Any) -> Any:
    loss = inner.func(select(mask, kernel))
    inside.mark_weight_loss(loss)
    return loss


def inner_layer(layer: Any) -> Any:
    """Returns the layer in a `MaskedLayer`, which stays as it is, or the layer itself."""
    return layer.layer if isinstance(layer, MaskedLayer) else layer


def wrap(layer: Any, wall: bool = True) -> Any:
    """Returns a layer in a `MaskedLayer`, or itself where it holds no kernels, or is one."""
    if isinstance(layer, MaskedLayer):
        return layer
    shapes = {id(kernel): kernel.shape for _, _, kernel in hosts_of(layer)}
    if not shapes:
        return layer
    wrapped = MaskedLayer(layer, list(shapes.values()), wall)
    wrapped.build(None)
    return wrapped


def unwrap(layer: Any) -> Any:
    """Returns the layer in a `MaskedLayer`, as it was before, or the layer itself."""
    if not isinstance(layer, MaskedLayer):
        return layer
    for owner, *_ in layer._hosts:
        losses = inside.weight_losses(owner)
        inside.set_weight_losses(owner, [getattr(f, "plain", f) for f in losses])
    return layer.layer
