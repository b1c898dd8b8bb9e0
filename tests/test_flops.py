"""FLOPs against the published factors, and against counts by hand."""

import dataclasses

import numpy as np
import pytest

from lth_tf import masks, pruning
from lth_tf.analysis import flops
from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.models import build
from lth_tf.scopes import SCOPES
from lth_tf.spec import Spec


@pytest.fixture(scope="module")
def resnet50():
    return build(Spec(model="imagenet_resnet50"), (224, 224, 3), 1000, 0)


# README of the published code of Evci et al. 2020, "Rigging the lottery": ResNet-50.
@pytest.mark.parametrize(
    "scope, density, factor",
    [
        ("uniform", 0.2, 0.23), ("uniform", 0.1, 0.13), ("uniform", 0.05, 0.08),
        ("uniform", 0.035, 0.07), ("erk", 0.2, 0.42), ("erk", 0.1, 0.24), ("erk", 0.05, 0.12),
        ("erk", 0.035, 0.09),
    ],
)  # fmt: skip
def test_resnet_50_has_the_published_factors(resnet50, scope, density, factor):
    rng = np.random.default_rng(0)
    kernels = pruning.kernels(resnet50)
    scores = {n: rng.random(v.shape, np.float32) for n, v in kernels.items()}
    mask = SCOPES[scope](scores, density)
    assert flops.inference(resnet50, mask) == pytest.approx(factor, abs=0.01)


def test_each_weight_counts_as_often_as_it_is_used():
    x = keras.Input([6, 6, 2])
    y = keras.layers.Conv2D(3, 3, name="conv")(x)  # 4 x 4 positions
    same = keras.layers.Dense(3, name="same", use_bias=False)
    y = same(same(y))  # 16 positions, twice
    y = keras.layers.Dense(5, name="output")(keras.layers.Flatten()(y))
    model = keras.Model(x, y)
    assert flops.positions(model) == {"conv/kernel": 16, "same/kernel": 32, "output/kernel": 1}
    assert flops.positions(pruning.prune(model)) == flops.positions(model)
    mask = masks.ones({n: tuple(v.shape) for n, v in pruning.kernels(model).items()})
    assert flops.inference(model, mask) == 1
    mask["conv/kernel"][:2] = 0  # 36 of 54
    whole = 16 * 54 + 32 * 9 + 240
    assert flops.inference(model, mask) == pytest.approx((whole - 16 * 36) / whole)
    with pytest.raises(UserError, match="the mask lacks"):
        flops.inference(model, {"conv/kernel": mask["conv/kernel"]})


def test_training_by_hand():
    rigl = Spec(recipe="sparse", method="rigl", train_steps=100, update_every=10, update_until=51)
    f = 0.2
    # Updates at 10, 20, 30, 40 and 50; 95 steps that train.
    assert flops.training(rigl, f) == pytest.approx((95 * 3 * f + 5 * (2 * f + 1)) / 300)
    both = dataclasses.replace(rigl, update_trains=True)
    assert flops.training(both, f) == pytest.approx((100 * 3 * f + 5 * (2 * f + 1)) / 300)
    static = Spec(recipe="sparse", method="static", train_steps=100)
    assert flops.training(static, f) == pytest.approx(f)
    snfs = dataclasses.replace(rigl, method="snfs")
    assert flops.training(snfs, f) == pytest.approx((2 * f + 1) / 3)
    gmp = Spec(recipe="sparse", method="gmp", train_steps=4, update_every=1, update_from=1,
               update_until=2)  # fmt: skip
    # Steps 0 and 1 dense; at 1 nothing falls yet, after 2 all has.
    assert flops.training(gmp, f, 1.0) == pytest.approx((3 * 3 + 3 * f) / 12)
    imp = Spec(rewind_step=10.0, train_steps=100)
    assert flops.training(imp, f, steps=90) == pytest.approx(0.9 * f)


def test_a_subclassed_model_does_not_tell():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(UserError, match="is no graph of layers"):
        flops.positions(Own())
