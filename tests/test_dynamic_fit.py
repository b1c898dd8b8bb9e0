"""Masks that move in a `fit` of one's own."""

import numpy as np
import pytest
from test_dynamic import by_hand

import lth_tf
from lth_tf import masks, pruning
from lth_tf.callbacks import GMP, SET, GraNet, RigL
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning.slots import slots_for

layers = keras.layers
RNG = np.random.default_rng(0)
X = RNG.normal(size=(160, 12)).astype("float64")
Y = X[:, :4].argmax(1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def build(optimizer="sgd", model=keras.Sequential, **options):
    keras.utils.set_random_seed(3)
    network = [
        keras.Input([12], dtype="float64"),
        layers.Dense(9, "relu", dtype="float64", name="a"),
        layers.BatchNormalization(dtype="float64", name="norm"),
        layers.Dense(4, dtype="float64", name="b"),
    ]
    pruned = lth_tf.prune(model(network))
    pruned.compile(optimizer, LOSS, metrics=["accuracy"], **options)
    return pruned


def mirrored(many):
    devices = [f"CPU:{i}" for i in range(many)]
    return tf.distribute.MirroredStrategy(devices, tf.distribute.ReductionToOneDevice())


def fit(model, callback, epochs=2, **options):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16, drop_remainder=True)
    return model.fit(data, epochs=epochs, verbose=0, callbacks=[callback], **options)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [RigL, SET, GraNet, GMP])
def test_masks_move_and_keep_what_they_are_to(kind):
    model = build("adam")
    callback = kind(18, every=3, density=0.25)
    traced = model.train_function
    fit(model, callback)
    assert model.train_function is not callback._train and traced is None
    assert int(model.optimizer.iterations) == 20
    assert masks.density(lth_tf.get_mask(model)) == pytest.approx(0.25, abs=0.01)
    assert 0.25 < callback.explored <= 1
    pruning.check(model, model.optimizer)
    fit(model, callback, epochs=1)  # where nothing moves any more
    assert masks.density(lth_tf.get_mask(model)) == pytest.approx(0.25, abs=0.01)


def test_rigl_ranks_the_batch_of_its_step_and_does_not_train_on_it():
    model = build(keras.optimizers.SGD(0.1, momentum=0.9))
    seen = {}

    class Looker(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen[batch] = (
                {n: v.numpy() for n, v in pruning.weights(model).items()},
                {n: slots_for(model.optimizer, v)[0].numpy()
                 for n, v in pruning.kernels(model).items() if batch},
                lth_tf.get_mask(model),
            )  # fmt: skip

    callback = RigL(8, every=4, density=0.5, drop_fraction=0.5, schedule="constant")
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    model.fit(data, verbose=0, callbacks=[callback, Looker()])
    weights, slots, mask = seen[4]
    after, slots_after, new = seen[5]
    pruning.assign(model, weights, mask)
    pruning.set_mask(model, masks.ones({n: m.shape for n, m in mask.items()}))
    kernels = pruning.kernels(model)
    with tf.GradientTape() as tape:
        loss = LOSS(Y[64:80], model(X[64:80], training=True))
    for (n, m), g in zip(mask.items(), tape.gradient(loss, list(kernels.values())), strict=True):
        want = by_hand(m, weights[n], np.abs(g.numpy()), int(m.sum()), 0.5)
        assert np.array_equal(new[n], want) and not np.array_equal(new[n], m)
        stayed, born = (m != 0) & (want != 0), (m == 0) & (want != 0)
        assert np.array_equal(after[n][stayed], weights[n][stayed])
        assert np.array_equal(slots_after[n][stayed], slots[n][stayed])
        assert not after[n][born].any() and not slots_after[n][born].any()
    others = [n for n in weights if n not in mask]
    assert all(np.array_equal(weights[n], after[n]) for n in others)  # statistics, too


@pytest.mark.slow
def test_replicas_move_the_same_entries():
    found = []
    for many in (1, 2, 4):
        with mirrored(many).scope():
            keras.utils.set_random_seed(3)
            network = [keras.Input([12]), layers.Dense(9, "relu", dtype="float64", name="a"),
                       layers.Dense(4, dtype="float64", name="b")]  # fmt: skip
            model = lth_tf.prune(keras.Sequential(network))
            model.compile(keras.optimizers.SGD(0.1), LOSS)
        fit(model, RigL(18, every=3, density=0.3))
        found.append(lth_tf.get_mask(model))
    for other in found[1:]:
        assert all(np.array_equal(m, other[n]) for n, m in found[0].items())


def test_a_train_step_of_ones_own_tells_its_loss():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4, dtype="float64")

        def call(self, x):
            return self.dense(x)

        def train_step(self, data):
            return super().train_step(data)

    own = Own()
    own(X[:2])
    model = lth_tf.prune(own)
    model.compile("sgd", LOSS)
    with pytest.raises(UserError, match="has a train_step of its own"):
        fit(model, RigL(18, every=3, density=0.3))
    fit(model, SET(18, every=3, density=0.3), epochs=1)
    callback = RigL(18, every=3, density=0.3, loss=lambda m, d: LOSS(d[1], m(d[0], training=True)))
    fit(model, callback)
    assert callback.explored > 0.3


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="steps_per_execution"):
        fit(build(steps_per_execution=2), RigL(18, every=3, density=0.3))
    with pytest.raises(UserError, match="the mask would never be updated"):
        RigL(3, every=5)
    with pytest.raises(UserError, match="GMP needs a density to end with"):
        GMP(200)
    with pytest.raises(UserError, match=r"falls from 0.5 \(initial_density\) to 0.7"):
        GraNet(200, density=0.7)
    plain = keras.Sequential([keras.Input([12]), layers.Dense(4)])
    plain.compile("sgd", LOSS)
    with pytest.raises(UserError, match="is not pruned; call prune"):
        fit(plain, RigL(18, every=3))
    two = build()
    two.other = keras.optimizers.SGD()
    with pytest.raises(UserError, match="has 2 optimizers; RigL is for models that one trains"):
        fit(two, RigL(18, every=3))
    accumulates = build()
    accumulates.optimizer.gradient_accumulation_steps = 4
    with pytest.raises(UserError, match="gradient_accumulation_steps"):
        fit(accumulates, RigL(18, every=3))
