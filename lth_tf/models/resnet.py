"""Residual networks (He et al. 2016), for small images and for ImageNet.

A block computes relu(F(x) + shortcut(x)), where F is two or three convolutions without
biases, each followed by batch normalisation. Convolutions with strides pad alike on all
sides, as the papers' code does, so that F(x) and shortcut(x) look at the same pixels.
`width` is a factor on the channels of all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.models.parts import Builder, initialisers, norm, scaled
from lth_tf.pruning.inside import unread


@keras.saving.register_keras_serializable(package="lth_tf")
class IdentityShortcut(keras.layers.Layer):
    """Every `strides`-th pixel, with zeros for the channels that it lacks; no parameters.

    Option A of He et al. 2016, section 3.3:
    [n, h, w, c] -> [n, ceil(h / strides), ceil(w / strides), filters], the zeros last.

    Args:
      filters: channels of the output, at least those of the input.
      strides: in both directions.
    """

    def __init__(self, filters: int, strides: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides

    @unread
    def call(self, inputs: Any) -> Any:
        """Subsamples and pads."""
        x = inputs[:, :: self.strides, :: self.strides]
        return tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, self.filters - x.shape[-1]]])

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration."""
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}


def conv(x: Any, inits: Iterator[Any], filters: int, size: int, strides: int, name: str) -> Any:
    """Returns a convolution without bias whose output at p is centred on the input at strides x p.

    Args:
      x: its input.
      inits: of which the next is its kernel's.
      filters, size, strides: of it.
      name: its own, and a part of that of the padding.
    """
    if strides > 1 and size > 1:
        # Keras' "same" pads even sizes on the far sides only: half a stride off the centre.
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    return keras.layers.Conv2D(
        filters,
        size,
        strides,
        padding="same" if strides == 1 else "valid",
        use_bias=False,
        kernel_initializer=next(inits),
        name=name,
    )(x)


def _block(
    x: Any, inits: Iterator[Any], convs: list[tuple[int, int, int]], shortcut: str, name: str
) -> Any:
    """One block of convolutions (filters, size, strides)."""
    y = x
    for i, (filters, size, strides) in enumerate(convs, 1):
        if i > 1:
            y = keras.layers.ReLU(name=f"{name}_relu{i - 1}")(y)
        y = norm(f"{name}_norm{i}")(conv(y, inits, filters, size, strides, f"{name}_conv{i}"))
    strides = max(s for _, _, s in convs)
    if strides > 1 or x.shape[-1] != filters:
        if shortcut == "projection":
            x = conv(x, inits, filters, 1, strides, f"{name}_shortcut")
            x = norm(f"{name}_shortcut_norm")(x)
        else:
            x = IdentityShortcut(filters, strides, name=f"{name}_shortcut")(x)
    y = keras.layers.Add(name=f"{name}_add")([y, x])
    return keras.layers.ReLU(name=f"{name}_relu{len(convs)}")(y)


def _stages(
    x: Any, inits: Iterator[Any], blocks: list[int], filters: list[int], bottleneck: bool,
    shortcut: str, classes: int,
) -> Any:  # fmt: skip
    """Stages of so many blocks, all but the first at half the size; then mean and logits."""
    for stage, (n, f) in enumerate(zip(blocks, filters, strict=True), 1):
        for block in range(n):
            strides = 2 if stage > 1 and block == 0 else 1
            if bottleneck:
                convs = [(f, 1, 1), (f, 3, strides), (4 * f, 1, 1)]
            else:
                convs = [(f, 3, strides), (f, 3, 1)]
            x = _block(x, inits, convs, shortcut, f"stage{stage}_block{block}")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.layers.Dense(classes, kernel_initializer=next(inits), name="output")(x)


def _small(depth: int) -> Builder:
    def build(
        input_shape: tuple[int, ...],
        classes: int,
        seed: int,
        *,
        init: str = "glorot_normal",
        width: float = 1.0,
        shortcut: str = "projection",
    ) -> Any:
        if shortcut not in ("projection", "identity"):
            raise UserError(f"unknown shortcut {shortcut!r}; there are: projection, identity")
        inits = initialisers(init, seed)
        filters = [scaled(n, width) for n in (16, 32, 64)]
        inputs = keras.Input(input_shape)
        x = conv(inputs, inits, filters[0], 3, 1, "stem_conv")
        x = keras.layers.ReLU(name="stem_relu")(norm("stem_norm")(x))
        x = _stages(x, inits, [(depth - 2) // 6] * 3, filters, False, shortcut, classes)
        return keras.Model(inputs, x, name=f"resnet{depth}")

    build.__doc__ = (
        f"{depth} layers for small images: 3 stages of {(depth - 2) // 6} blocks at 16, 32 and 64 "
        "channels (He et al. 2016, section 4.2). Shortcuts between stages: 'projection', a 1x1 "
        "convolution with batch normalisation, or 'identity', without parameters as in that "
        "section."
    )
    return build


def _imagenet(depth: int, blocks: list[int], bottleneck: bool) -> Builder:
    def build(
        input_shape: tuple[int, ...],
        classes: int,
        seed: int,
        *,
        init: str = "glorot_normal",
        width: float = 1.0,
    ) -> Any:
        inits = initialisers(init, seed)
        filters = [scaled(n, width) for n in (64, 128, 256, 512)]
        inputs = keras.Input(input_shape)
        x = conv(inputs, inits, filters[0], 7, 2, "stem_conv")
        x = keras.layers.ReLU(name="stem_relu")(norm("stem_norm")(x))
        # Zeros are as good as no padding here: nothing after a ReLU is less.
        x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, name="stem_pool")(x)
        x = _stages(x, inits, blocks, filters, bottleneck, "projection", classes)
        return keras.Model(inputs, x, name=f"imagenet_resnet{depth}")

    kind = "three (1x1, 3x3, 1x1)" if bottleneck else "two 3x3"
    build.__doc__ = (
        f"{depth} layers for ImageNet: a 7x7 stem, 4 stages of {blocks} blocks of {kind} "
        "convolutions (He et al. 2016, table 1). Where a block of three has strides, it is its "
        "3x3 convolution that has them, as in torchvision ('v1.5'), not the first 1x1 one."
    )
    return build


DEPTHS = (20, 32, 44, 56, 110)


def register_all(register: Callable[..., Callable[[Builder], Builder]]) -> None:
    """Enters all of them, by `models.register`."""
    for depth in DEPTHS:
        like = None if depth == DEPTHS[0] else f"resnet{DEPTHS[0]}"
        register(f"resnet{depth}", smallest=1, like=like)(_small(depth))
    register("imagenet_resnet18", smallest=1, like="resnet20")(_imagenet(18, [2, 2, 2, 2], False))
    register("imagenet_resnet50", smallest=1)(_imagenet(50, [3, 4, 6, 3], True))
