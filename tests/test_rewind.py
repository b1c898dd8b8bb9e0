"""Rewind: what training starts from, bit for bit; Density: what must hold at every epoch."""

from __future__ import annotations

import numpy as np
import pytest

from lth_tf import masks, pruning
from lth_tf.callbacks import Density, Rewind
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import InvariantError, prune, set_mask, slots_of, weights

layers, optimizers = keras.layers, keras.optimizers
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((16, 6), np.float32), RNG.standard_normal((16, 3), np.float32)
MASK = {
    "a/kernel": (RNG.random((6, 5)) < 0.5).astype(np.uint8),
    "b/kernel": (RNG.random((5, 3)) < 0.5).astype(np.uint8),
}


def build(optimizer, **options):
    keras.utils.set_random_seed(0)
    first = layers.Dense(5, use_bias=False, name="a")
    norm, last = layers.BatchNormalization(name="n"), layers.Dense(3, name="b")
    model = prune(keras.Sequential([keras.Input((6,)), first, norm, last]))
    model.compile(optimizer, "mse", **options)
    return model


def fit(model, *callbacks, steps=4):
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
    return model.fit(batches, steps_per_epoch=steps, verbose=0, callbacks=list(callbacks))


def values(model):
    return {name: v.numpy() for name, v in weights(model).items()}


def state(optimizer):
    variables = pruning.inner_optimizer(optimizer).variables
    return [v.numpy() for v in (variables() if callable(variables) else variables)]


def assert_equal(a, b):
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], name)
        np.testing.assert_array_equal(np.signbit(a[name]), np.signbit(b[name]), name)


class Beginning(keras.callbacks.Callback):
    """Looks at what a Rewind before it has left."""

    def on_train_begin(self, logs=None):
        self.weights = values(self.model)
        self.state = state(self.model.optimizer)
        self.step = int(self.model.optimizer.iterations.numpy())
        pruning.check(self.model, self.model.optimizer)


OPTIMIZERS = {
    "adam": lambda: optimizers.Adam(0.1, amsgrad=True),
    "ema": lambda: optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=2),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "legacy": lambda: optimizers.legacy.Adam(0.1),
    "legacy_adagrad": lambda: optimizers.legacy.Adagrad(0.1),
    "scaled": lambda: keras.mixed_precision.LossScaleOptimizer(optimizers.Adam(0.1)),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_starts_as_if_nothing_had_been_trained(name):
    model = build(OPTIMIZERS[name]())
    saved = {n: RNG.standard_normal(v.shape, np.float32) for n, v in weights(model).items()}
    saved["a/kernel"][MASK["a/kernel"] == 0] = -0.0
    saved["b/kernel"][MASK["b/kernel"] == 0] = np.nan
    saved["n/moving_variance"] = np.abs(saved["n/moving_variance"])
    optimizer, first, second = model.optimizer, Beginning(), Beginning()

    fit(model, Rewind(saved, MASK), first, Density())
    assert_equal(first.weights, masks.apply(MASK, saved))
    assert first.step == 0
    end = values(model)
    assert all((end[n] != first.weights[n]).any() for n in end)  # BatchNorm's statistics, too
    if name == "scaled":
        optimizer._loss_scale.counter.assign(7)
        optimizer._loss_scale.current_loss_scale.assign(4.0)

    fit(model, Rewind(saved, MASK, step=3), second, Density())
    assert_equal(second.weights, first.weights)
    assert second.step == 3
    assert len(second.state) == len(first.state) > 2
    fresh = [np.asarray(3)] + first.state[1:]
    for old, new in zip(second.state, fresh, strict=True):
        np.testing.assert_array_equal(old, new)
    if name == "scaled":
        assert optimizer.loss_scale == optimizer.initial_scale
    else:
        # Without a schedule the step changes Adam's bias correction only.
        fit(model, Rewind(saved, MASK), Density())
        assert_equal(values(model), end)
    slots = {n: [s.numpy() for s in found] for n, found in slots_of(optimizer, model).items()}
    assert all(len(s) == (1 if "adagrad" in name else 3 if name == "adam" else 2)
               for s in slots.values())  # fmt: skip


def test_adagrad_starts_at_its_own_value_and_averages_at_the_weights():
    model, look = build(optimizers.Adagrad(0.1, use_ema=True)), Beginning()

    class Slots(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            found = slots_of(self.model.optimizer, self.model)
            self.slots = {s.name: s.numpy() for s in found["a/kernel"]}

    slots = Slots()
    for _ in range(2):
        fit(model, Rewind(mask=MASK), look, slots)
        average, accumulator = slots.slots.values()
        np.testing.assert_array_equal(average, look.weights["a/kernel"])
        np.testing.assert_array_equal(accumulator, np.float32(0.1) * MASK["a/kernel"])


def test_without_weights_and_mask_the_models_own_are_kept():
    model, look = build("adam"), Beginning()
    set_mask(model, MASK)
    before = values(model)
    fit(model, Rewind(), look)
    assert_equal(look.weights, before)
    assert_equal(pruning.get_mask(model), MASK)


def test_captured_weights_are_those_of_a_shorter_training():
    model = build(optimizers.Adam(0.1))
    start = values(model)
    rewind = Rewind(start, MASK, capture=2)
    fit(model, rewind)
    captured = rewind.captured
    assert any((captured[n] != values(model)[n]).any() for n in captured)

    shorter = build(optimizers.Adam(0.1))
    fit(shorter, Rewind(start, MASK), steps=2)
    assert_equal(captured, values(shorter))

    # In blocks of steps, at their end.
    blocks = build(optimizers.Adam(0.1), steps_per_execution=2)
    rewind = Rewind(start, MASK, capture=2)
    fit(blocks, rewind)
    assert_equal(rewind.captured, captured)

    # And training may go on from there, at step 2 of the schedule.
    rewind = Rewind(captured, MASK, step=2, capture=2)
    fit(blocks, rewind, steps=2)
    assert_equal(rewind.captured, masks.apply(MASK, captured))
    assert blocks.optimizer.iterations.numpy() == 4


def test_the_beginning_can_be_captured():
    model = build("adam")
    start = values(model)
    rewind = Rewind(start, MASK, capture=0)
    fit(model, rewind)
    assert_equal(rewind.captured, masks.apply(MASK, start))


def test_on_two_replicas():
    # Collectives of several strategies in one process would get in each other's way.
    reduction = tf.distribute.ReductionToOneDevice()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], reduction).scope():
        model = build(optimizers.Adam(0.1, use_ema=True))
    start, look = values(model), Beginning()
    for _ in range(2):
        rewind = Rewind(start, MASK, capture=2)
        fit(model, rewind, look, Density())
        assert_equal(look.weights, masks.apply(MASK, start))
        assert any((rewind.captured[n] != look.weights[n]).any() for n in start)
    for variable in weights(model).values():
        if "moving" not in variable.name:  # BatchNorm's statistics differ until they are read
            np.testing.assert_array_equal(*(v.numpy() for v in variable.values))


# --- Errors ----------------------------------------------------------------------------


def test_a_capture_inside_a_block_of_steps_raises():
    model = build("adam", steps_per_execution=2)
    with pytest.raises(UserError, match="step 3, .* was jumped over .now at 4.*steps_per_exec"):
        fit(model, Rewind(capture=3))


@pytest.mark.parametrize("stopped", [False, True])
def test_a_training_that_ends_before_the_capture_raises(stopped):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = stopped

    with pytest.raises(UserError, match="ended before step 5"):
        fit(build("adam"), Rewind(capture=5), Stop())


def test_a_capture_before_the_beginning_raises():
    with pytest.raises(UserError, match="cannot capture step 1: training starts at step 2"):
        Rewind(step=2, capture=1)


def test_what_does_not_fit_raises():
    model = build("adam")
    start = values(model)
    for rewind, message in [
        (Rewind({"a/kernel": start["a/kernel"]}), "set of weights lacks"),
        (Rewind({**start, "b/bias": np.zeros(6)}), "'b/bias' has shape"),
        (Rewind({**start, "c/bias": np.zeros(6)}), "which the model has not"),
        (Rewind(start, {"a/kernel": MASK["a/kernel"]}), "mask lacks .'b/kernel'."),
    ]:
        with pytest.raises(UserError, match=message):
            fit(model, rewind)
    model.compile("ftrl", "mse")
    with pytest.raises(UserError, match="Ftrl"):
        fit(model, Rewind(start, MASK))


# --- Density ---------------------------------------------------------------------------


def test_density_is_logged():
    history = fit(build("adam"), Rewind(mask=MASK), Density()).history
    assert history["density"] == [masks.density(MASK)]


@pytest.mark.parametrize("what", ["weights", "slots"])
def test_density_finds_what_leaks(what):
    class Leak(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            kernel = pruning.kernels(self.model)["b/kernel"]
            slots = slots_of(self.model.optimizer, self.model)["b/kernel"]
            (kernel if what == "weights" else slots[0]).assign(np.ones((5, 3), np.float32))

    with pytest.raises(InvariantError, match="b/kernel.* are not zero"):
        fit(build(optimizers.Adam()), Rewind(mask=MASK), Leak(), Density(), steps=1)
