"""Recurrent networks that say which character comes next."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.models.parts import Builder, countable, initialisers


def family(name: str) -> Builder | None:
    """Returns the builder of any 'gru_E_H', None of other names."""
    found = re.fullmatch(r"gru_([1-9]\d*)_([1-9]\d*)", name)
    if not found:
        return None
    size, units = (countable(int(n)) for n in found.groups())

    def build(
        input_shape: tuple[int, ...], classes: int, seed: int, *, init: str = "glorot_normal"
    ) -> Any:
        if len(input_shape) != 1:
            raise UserError(
                f"model {name!r} takes sequences of whole numbers, [length] each, not inputs of "
                f"shape {list(input_shape)}; use a data set such as tiny_shakespeare"
            )
        inits = initialisers(init, seed)
        one, two = np.random.default_rng([seed, 0x6215]).integers(2**31 - 1, size=2).tolist()
        inputs = keras.Input(input_shape, dtype="int32")
        uniform = keras.initializers.RandomUniform(-0.05, 0.05, seed=one)
        x = keras.layers.Embedding(
            classes, size, embeddings_initializer=uniform, name="embedding"
        )(inputs)
        x = keras.layers.GRU(
            units, return_sequences=True, kernel_initializer=next(inits),
            recurrent_initializer=keras.initializers.Orthogonal(seed=two), name="gru",
        )(x)  # fmt: skip
        x = keras.layers.Dense(classes, kernel_initializer=next(inits), name="output")(x)
        return keras.Model(inputs, x, name="gru")

    build.__doc__ = (
        f"An embedding of {size}, gated recurrent units, {units} (Cho et al. 2014; with the reset "
        "gate behind the product, as cuDNN has it), and a dense layer at each position. `init` is "
        "for kernels; recurrent ones are orthogonal, the embedding uniform, as Keras has them."
    )
    return build
