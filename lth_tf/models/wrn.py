"""Wide residual networks (Zagoruyko and Komodakis 2016) for small images.

WRN-D-K has D = 6 n + 4 layers: a convolution of 16 filters, three stages of n blocks at 16 K, 32 K
and 64 K channels, a mean and a dense layer. A block computes x + F(x), where F is twice batch
normalisation, ReLU and a 3x3 convolution without bias; where sizes differ the shortcut is a 1x1
convolution of what the first ReLU puts out. No dropout.
"""

from __future__ import annotations

import re
from typing import Any

from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.models.parts import Builder, countable, initialisers, norm
from lth_tf.models.resnet import conv


def family(name: str) -> Builder | None:
    """Returns the builder of any 'wrn_D_K', None of other names.

    Raises:
      UserError: there is no network of that depth.
    """
    found = re.fullmatch(r"wrn_([1-9]\d*)_([1-9]\d*)", name)
    if not found:
        return None
    depth, wide = int(found[1]), int(found[2])
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"model {name!r}: its depth is not 6 n + 4: 10, 16, 22, 28, 34, 40, ...")
    countable(64 * wide)

    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        inits = initialisers(init, seed)
        inputs = keras.Input(input_shape)
        x = conv(inputs, inits, 16, 3, 1, "stem_conv")
        for stage, filters in enumerate((16 * wide, 32 * wide, 64 * wide), 1):
            for block in range((depth - 4) // 6):
                here = f"stage{stage}_block{block}"
                strides = 2 if stage > 1 and block == 0 else 1
                y = keras.layers.ReLU(name=f"{here}_relu1")(norm(f"{here}_norm1")(x))
                if x.shape[-1] != filters:
                    x = conv(y, inits, filters, 1, strides, f"{here}_shortcut")
                y = conv(y, inits, filters, 3, strides, f"{here}_conv1")
                y = keras.layers.ReLU(name=f"{here}_relu2")(norm(f"{here}_norm2")(y))
                y = conv(y, inits, filters, 3, 1, f"{here}_conv2")
                x = keras.layers.Add(name=f"{here}_add")([y, x])
        x = keras.layers.ReLU(name="relu")(norm("norm")(x))
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        x = keras.layers.Dense(classes, kernel_initializer=next(inits), name="output")(x)
        return keras.Model(inputs, x, name=name)

    build.__doc__ = f"{depth} layers, {wide} times as wide as a ResNet (table 1)."
    return build
