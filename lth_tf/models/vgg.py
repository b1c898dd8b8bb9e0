"""VGG networks (Simonyan and Zisserman 2015) with batch normalisation, for small images and large.

Five stages of 3x3 convolutions at 64, 128, 256, 512 and 512 channels, max-pools between;
`width` is a factor on all of these numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lth_tf.compat import keras
from lth_tf.models.parts import (
    Builder,
    StatelessDropout,
    initialisers,
    norm,
    scaled,
)

CONVOLUTIONS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def _stages(inits: Iterator[Any], depth: int, width: float, pools: int, bias: bool) -> list[Any]:
    """The convolutions, each with batch normalisation and ReLU, `pools` stages with a max-pool."""
    layers: list[Any] = []
    stages = zip(CONVOLUTIONS[depth], (64, 128, 256, 512, 512), strict=True)
    for stage, (n, filters) in enumerate(stages, 1):
        for i in range(1, n + 1):
            layers += [
                keras.layers.Conv2D(
                    scaled(filters, width),
                    3,
                    padding="same",
                    use_bias=bias,
                    kernel_initializer=next(inits),
                    name=f"stage{stage}_conv{i}",
                ),
                norm(f"stage{stage}_norm{i}"),
                keras.layers.ReLU(name=f"stage{stage}_relu{i}"),
            ]
        if stage <= pools:
            layers.append(keras.layers.MaxPooling2D(name=f"stage{stage}_pool"))
    return layers


def _small(depth: int) -> Builder:
    def build(
        input_shape: tuple[int, ...],
        classes: int,
        seed: int,
        *,
        init: str = "glorot_normal",
        width: float = 1.0,
    ) -> Any:
        inits = initialisers(init, seed)
        layers = [
            keras.Input(input_shape),
            *_stages(inits, depth, width, 4, bias=False),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"),
        ]
        return keras.Sequential(layers, name=f"vgg{depth}")

    build.__doc__ = (
        f"VGG-{depth} for small images, as the pruning papers have it (Frankle and Carbin 2019; "
        "Wang et al. 2020): convolutions without biases, 4 max-pools, global average pooling and "
        "a single dense layer. For images of 16x16 or more."
    )
    return build


def imagenet_vgg16(
    input_shape: tuple[int, ...],
    classes: int,
    seed: int,
    *,
    init: str = "glorot_normal",
    width: float = 1.0,
) -> Any:
    """VGG-16 for ImageNet, with batch normalisation: 5 max-pools, dense layers 4096 and 4096.

    Configuration D of Simonyan and Zisserman 2015, table 1, with dropout of 0.5 after both
    hidden dense layers. As in torchvision's vgg16_bn, of which it has the 138,365,992
    parameters (224x224 images, 1000 classes), the convolutions have biases, which batch
    normalisation makes superfluous.

    Args:
      input_shape: 32x32 or more; it decides the size of the first dense layer.
      classes, seed, init: see `MODELS`.
      width: factor on the channels, and on the dense layers, too.
    """
    inits = initialisers(init, seed)
    layers = [
        keras.Input(input_shape),
        *_stages(inits, 16, width, 5, bias=True),
        keras.layers.Flatten(name="flatten"),
    ]
    for i in (1, 2):
        layers += [
            keras.layers.Dense(
                scaled(4096, width),
                activation="relu",
                kernel_initializer=next(inits),
                name=f"fc{i}",
            ),
            StatelessDropout(0.5, seed * 16 + i, name=f"drop_fc{i}"),
        ]
    layers.append(keras.layers.Dense(classes, kernel_initializer=next(inits), name="output"))
    return keras.Sequential(layers, name="imagenet_vgg16")


def register_all(register: Callable[..., Callable[[Builder], Builder]]) -> None:
    """Enters all of them, by `models.register`."""
    for depth in CONVOLUTIONS:
        register(f"vgg{depth}", smallest=16)(_small(depth))
    register("imagenet_vgg16", smallest=32)(imagenet_vgg16)
