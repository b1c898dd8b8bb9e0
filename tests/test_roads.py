"""Masks by every road: kernels read past their layer, any optimizer, loop, precision, replicas."""

from __future__ import annotations

import collections
import itertools
import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest

import lth_tf
from lth_tf.callbacks import Best, Density, Rewind
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.pruning import (
    InvariantError,
    check,
    get_mask,
    kernels,
    plain,
    prune,
    set_mask,
    strip,
    walls,
    weights,
)
from lth_tf.pruning.slots import slots_for

layers, optimizers = keras.layers, keras.optimizers
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((8, 6), np.float32), RNG.standard_normal((8, 6), np.float32)


def random_mask(model, density=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {n: (rng.random(k.shape) < density).astype(np.uint8) for n, k in kernels(model).items()}


# --- Roads -----------------------------------------------------------------------------


class Tied(layers.Layer):
    """Reads the kernel of another layer, from the list of its weights."""

    def __init__(self, other, **options):
        super().__init__(**options)
        self.other = other

    def call(self, x):
        return tf.matmul(x, tf.cast(self.other.weights[0], x.dtype), transpose_b=True)


class Alias(layers.Layer):
    """Has its kernel under a second name, too."""

    def build(self, shape):
        self.kernel = self.w = self.add_weight("kernel", (shape[-1], 5))

    def call(self, x):
        return tf.matmul(x, self.kernel) + tf.matmul(x, self.w)


class Closure(keras.Model):
    """Remembers its layers in functions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(5, "tanh", name="a"), layers.Dense(6, name="b")
        a, b = self.a, self.b
        self.f = lambda x: b(a(x))

    def call(self, x):
        return self.f(x)


def step(model, optimizer, data):
    x, y = data
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((tf.cast(model(x, training=True), tf.float32) - y) ** 2)
        scaled = isinstance(optimizer, keras.mixed_precision.LossScaleOptimizer)
        target = optimizer.get_scaled_loss(loss) if scaled else loss
    variables = model.trainable_variables
    gradients = tape.gradient(target, variables)
    if scaled:
        gradients = optimizer.get_unscaled_gradients(gradients)
    optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return {"loss": loss}


class Stepping(keras.Model):
    def train_step(self, data):
        return step(self, self.optimizer, data)


class SteppingClosure(Closure):
    def train_step(self, data):
        return step(self, self.optimizer, data)


def tied(kind):
    a = keras.Input((6,))
    dense = layers.Dense(5, name="a")
    return kind(a, Tied(dense)(dense(a)))


def in_a_lambda(kind):
    a = keras.Input((6,))
    dense = layers.Dense(5, name="a")
    back = layers.Lambda(lambda z: tf.matmul(z, tf.cast(dense.kernel, z.dtype), transpose_b=True))
    return kind(a, back(dense(a)))


def alias(kind):
    a = keras.Input((6,))
    return kind(a, layers.Dense(6, name="b")(Alias(name="a")(a)))


def closure(kind):
    model = Closure() if kind is keras.Model else SteppingClosure()
    model(X[:2])
    return model


def layered(kind):
    a = keras.Input((6,))
    x = layers.Dense(5, "tanh", kernel_constraint="unit_norm", name="a")(a)
    return kind(a, layers.Dense(6, name="b")(x))


ROADS = {f.__name__: f for f in (tied, in_a_lambda, alias, closure, layered)}
LOOPS = "fit", "own_loop", "train_step"
PRECISIONS = "float32", "mixed_bfloat16"
REPLICAS = "none", "mirrored"


class Noisy(optimizers.SGD):
    """Adds noise to all weights."""

    def update_step(self, gradient, variable):
        super().update_step(gradient + tf.random.normal(gradient.shape), variable)


NEW = "Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lion Nadam RMSprop SGD".split()
OLD = "Adadelta Adagrad Adam Adamax Ftrl Nadam RMSprop SGD".split()
OPTIMIZERS = {
    **{name: (lambda name=name: getattr(optimizers, name)(0.05)) for name in NEW},
    **{f"legacy_{n}": (lambda n=n: getattr(optimizers.legacy, n)(0.05)) for n in OLD},
    "clipped_average": lambda: optimizers.SGD(
        0.05, momentum=0.9, global_clipnorm=0.1, use_ema=True, ema_overwrite_frequency=2
    ),
    "Noisy": lambda: Noisy(0.05),
}
REFUSED = {"Adafactor", "Ftrl", "Noisy"}


def strategy_of(replicas):
    if replicas == "none":
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def assert_zero(model, optimizer):
    """Weights on every replica, and slots."""
    check(model, optimizer)
    mask = get_mask(model)
    for name, kernel in kernels(model).items():
        for part in getattr(getattr(kernel, "_variable", kernel), "values", [kernel]):
            pruned = part.numpy()[mask[name] == 0]
            assert not pruned.any() and not np.signbit(pruned).any(), name


def drive(optimizer, road, loop, precision, replicas):
    """Trains after `prune`, `set_mask` and only then a compile; 'held' or 'refused'."""
    keras.mixed_precision.set_global_policy(precision)
    strategy = strategy_of(replicas)
    try:
        with strategy.scope():
            model = prune(ROADS[road](Stepping if loop == "train_step" else keras.Model))
            set_mask(model, random_mask(model))
            used = OPTIMIZERS[optimizer]()
            model.compile(used, "mse")
        before = {n: v.numpy() for n, v in kernels(model).items()}

        @tf.function
        def steps(x, y):
            strategy.run(lambda x, y: step(model, used, (x, y)), (x, y))

        for i in range(2):
            try:
                if loop == "own_loop":
                    steps(X, Y)
                else:
                    model.fit(X, Y, 8, verbose=0)
            except Exception as error:  # in graphs autograph makes it one of its own
                if i or "does not keep a pruned weight at 0.0" not in str(error):
                    raise
                return "refused"
            assert_zero(model, used)
        assert all((v.numpy() != before[n]).any() for n, v in kernels(model).items())
        return "held"
    finally:
        keras.mixed_precision.set_global_policy("float32")


def every():
    return list(itertools.product(OPTIMIZERS, ROADS, LOOPS, PRECISIONS, REPLICAS))


def some(seed=0):
    """Each optimizer once, and all pairs of what else there is."""
    rng = random.Random(seed)
    rest = list(itertools.product(ROADS, LOOPS, PRECISIONS, REPLICAS))

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    missing, names, found = set().union(*map(pairs, rest)), list(OPTIMIZERS), []
    rng.shuffle(names)
    # Those that are refused train nothing and cover nothing.
    names.sort(key=lambda name: name in REFUSED)
    while missing or names:
        rng.shuffle(rest)
        best = max(rest, key=lambda case: len(pairs(case) & missing))
        name = names.pop(0) if names else "Adam"
        if name not in REFUSED:
            missing -= pairs(best)
        found.append((name, *best))
    return found


ALL = os.environ.get("LTH_TF_ALL_ROADS")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", some(), ids="-".join)
def test_a_pruned_weight_is_zero_by_every_road(case):
    expected = "refused" if case[0] in REFUSED else "held"
    assert drive(*case) == expected


@pytest.mark.skipif(not ALL, reason="LTH_TF_ALL_ROADS=1 tries all; docs/measured.md has counts")
def test_all_roads():
    counts: collections.Counter = collections.Counter()
    for case in every():
        try:
            counts[drive(*case)] += 1
        except Exception as error:  # noqa: BLE001
            counts["other"] += 1
            print(*case, repr(error)[:500], flush=True)
        if sum(counts.values()) % 60 == 0:
            tf.keras.backend.clear_session()
            print(dict(counts), flush=True)
    print(dict(counts))
    assert not counts["other"]


# --- The second wall -------------------------------------------------------------------


def small(**options):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, name="a", **options), layers.Dense(6, name="b")]
    )


def test_a_wall_goes_with_strip_and_comes_with_a_file(tmp_path):
    model = prune(small(kernel_constraint="unit_norm"))
    old = keras.constraints.UnitNorm
    first, second = kernels(model).values()
    assert isinstance(walls.wall_of(first).before, old) and walls.wall_of(second).before is None
    model.save(tmp_path / "m.keras")
    for kernel in kernels(keras.models.load_model(tmp_path / "m.keras")).values():
        assert walls.wall_of(kernel)
    with plain(model):
        pass
    assert walls.wall_of(first)
    stripped = strip(model)
    assert isinstance(first.constraint, old) and second.constraint is None
    set_mask(model, random_mask(model))  # training goes on
    assert isinstance(walls.wall_of(first).before, old)
    assert strip(model) is stripped
    stripped.compile("adam", "mse")
    stripped.fit(X, Y, verbose=0)
    assert all(kernel.numpy().all() for kernel in (first, second))


def test_without_a_wall_on_request():
    model = prune(small(), wall=False)
    set_mask(model, random_mask(model))
    assert not any(map(walls.wall_of, kernels(model).values()))


def test_a_plain_model_that_trains_on_its_own_does_not_wake_pruned_weights():
    model = small()
    model.compile("adam", "mse")
    model.fit(X, Y, verbose=0)
    pruned = prune(model)
    set_mask(pruned, random_mask(pruned))
    model.fit(X, Y, verbose=0)  # not with what it traced before
    check(pruned)


class Writes(layers.Dense):
    def call(self, x):
        self.kernel.assign(self.kernel / tf.norm(self.kernel))
        return super().call(x)


def revived(tmp_path):
    class Forgotten(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight("kernel", (6, 6))

        def call(self, x):
            return x @ self.kernel

    keras.Sequential([keras.Input((6,)), Forgotten(), layers.Dense(2)]).save(tmp_path / "m")
    return keras.models.load_model(tmp_path / "m")


def test_what_cannot_be_held_is_refused(tmp_path):
    with pytest.raises(Exception, match="layer 'w' writes to its kernel in its call"):
        prune(keras.Sequential([keras.Input((6,)), Writes(3, name="w")]))
    with pytest.raises(UserError, match="was read from a SavedModel without its class"):
        prune(revived(tmp_path))
    model = small()
    pruned = prune(model)
    with pytest.raises(UserError, match="a/kernel, b/kernel .*another pruned model.*strip"):
        prune(model)
    prune(strip(pruned))


# --- The optimizer that trains ---------------------------------------------------------


def slots(optimizer, kernel):
    return [slot.numpy() for slot in slots_for(optimizer, kernel)]


def test_an_optimizer_that_comes_later_is_looked_at_in_its_first_step():
    model = prune(small())
    mask = random_mask(model)
    set_mask(model, mask)
    for make in (lambda: optimizers.Adam(0.1), lambda: optimizers.Adagrad(0.1)):
        model.compile(make(), "mse")
        model.fit(X, Y, 8, verbose=0)
        check(model, model.optimizer)
        name, kernel = next(iter(kernels(model).items()))
        for slot in slots(model.optimizer, kernel):
            assert slot[mask[name] != 0].all() and not slot[mask[name] == 0].any()
    model.compile(Noisy(0.1), "mse")
    with pytest.raises(Exception, match="Noisy does not keep a pruned weight"):
        model.fit(X, Y, 8, verbose=0)


class Gan(keras.Model):
    """Two networks, an optimizer each; compiled, it has Keras' default as a third."""

    def __init__(self, held):
        super().__init__()
        self.g, self.d = layers.Dense(6, name="g"), layers.Dense(1, name="d")
        self.held = held
        if held:
            self.g_optimizer, self.d_optimizer = optimizers.Adam(0.1), optimizers.Adagrad(0.1)

    def call(self, x):
        return self.d(self.g(x))

    def train_step(self, data):
        x, _ = data
        for layer, optimizer, sign in (
            (self.g, self.g_optimizer, 1.0), (self.d, self.d_optimizer, -1.0),
        ):  # fmt: skip
            with tf.GradientTape() as tape:
                loss = sign * tf.reduce_mean(self(x, training=True))
            variables = layer.trainable_variables
            optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return {"loss": loss}


def test_models_with_optimizers_of_their_own_are_rewound():
    model = Gan(held=True)
    model(X)
    prune(model)
    model.compile()
    mask = random_mask(model)
    start = {n: v.numpy() for n, v in weights(model).items()}
    with pytest.raises(UserError, match=r"3 optimizers .RMSprop, Adam, Adagrad.*optimizers="):
        model.fit(X, Y, verbose=0, callbacks=[Rewind(start, mask)])
    used = [model.g_optimizer, model.d_optimizer]
    ends = []
    for _ in range(2):
        rewind = Rewind(start, mask, optimizers=used, capture=1)
        model.fit(X, Y, 4, verbose=0, shuffle=False, callbacks=[rewind, Density()])
        ends.append({n: v.numpy() for n, v in weights(model).items()})
        assert [int(each.iterations) for each in used] == [2, 2]
        for optimizer in used:
            check(model, optimizer)
    for name in start:
        np.testing.assert_array_equal(ends[0][name], ends[1][name])
        assert (ends[0][name] != start[name]).any()

    bare = Gan(held=False)
    bare(X)
    with pytest.raises(UserError, match="no optimizer"):
        callback = Rewind()
        callback.set_model(prune(bare))
        callback.on_train_begin()


# --- The mask that was set -------------------------------------------------------------


def test_old_masks_that_come_back_with_old_weights_are_noticed(tmp_path):
    model = prune(small())
    model.compile("adam", "mse")
    start, start_of = model.get_weights(), {n: v.numpy() for n, v in weights(model).items()}
    model.save_weights(tmp_path / "w")
    mask = random_mask(model)
    for back in (lambda: model.set_weights(start), lambda: model.load_weights(tmp_path / "w")):
        set_mask(model, mask)
        back()
        for use in (
            check,
            strip,
            lambda m: plain(m).__enter__(),
            lambda m: m.save(tmp_path / "m.keras"),
            lambda m: m.save(tmp_path / "m.h5"),
            lambda m: m.save(tmp_path / "m"),
            lambda m: m.save_weights(tmp_path / "m.weights.h5"),
            lambda m: m.save_weights(tmp_path / "checkpoint"),
            lambda m: m.fit(
                X, Y, verbose=0,
                callbacks=[keras.callbacks.ModelCheckpoint(tmp_path / "c", save_weights_only=True)],
            ),
            lambda m: m.fit(X, Y, verbose=0, callbacks=[Density()]),
        ):
            with pytest.raises(InvariantError, match=r"30 of 30 weights instead.*Rewind.*accept"):
                use(model)
    model.fit(X, Y, verbose=0, callbacks=[Rewind(start_of, mask), Density()])
    model.set_weights(start)
    set_mask(model, get_mask(model))
    check(model)
    model.save_weights(tmp_path / "w")  # in TensorFlow's format, and under the mask that was set


def test_the_best_weights_of_the_last_mask():
    class Gradually(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch in (0, 2):
                set_mask(self.model, random_mask(self.model, 0.9 - 0.3 * epoch))

    class Worse(keras.callbacks.Callback):
        """Epochs 0 and 3 are the best of the masks that they have."""

        values, seen = (0.1, 0.2, 0.5, 0.3, 0.4), {}  # noqa: RUF012

        def on_epoch_end(self, epoch, logs=None):
            logs["val_loss"] = self.values[epoch]
            self.seen = {
                **getattr(self, "seen", {}),
                epoch: kernels(self.model)["a/kernel"].numpy(),
            }

    model, worse, best = prune(small()), Worse(), Best()
    model.compile("adam", "mse")
    for order in ([best, Gradually()], [Gradually(), best]):
        set_mask(model, random_mask(model, 1.1))
        model.fit(X, Y, epochs=5, verbose=0, callbacks=[worse, *order], validation_data=(X, Y))
        assert (best.epoch, best.value) == (3, 0.3)
        np.testing.assert_array_equal(kernels(model)["a/kernel"], worse.seen[3])
        expected = random_mask(model, 0.3)
        assert all(np.array_equal(m, expected[n]) for n, m in get_mask(model).items())
        check(model, model.optimizer)
    with pytest.raises(UserError, match="no 'accuracy'"):
        model.fit(X, Y, verbose=0, callbacks=[Best("accuracy", "max")])


# --- Where training starts -------------------------------------------------------------


class Stop(Exception):
    pass


class Crash(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise Stop


@pytest.mark.sampled(1)
@pytest.mark.parametrize("first", ["backup", "rewind"])
def test_a_training_that_goes_on_is_not_rewound(first, tmp_path):
    def make():
        keras.utils.set_random_seed(0)
        model = prune(small())
        model.compile(optimizers.Adam(0.1), "mse")
        return model

    def fit(model, *more, capture=None, captured=None):
        rewind = Rewind(start, mask, capture=capture, captured=captured)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        two = [backup, rewind] if first == "backup" else [rewind, backup]
        model.fit(X, Y, 4, 4, verbose=0, shuffle=False, callbacks=[*two, *more, Density()])
        return {n: v.numpy() for n, v in weights(model).items()}

    model = make()
    start, mask = {n: v.numpy() for n, v in weights(model).items()}, random_mask(model)
    expected = fit(model)
    with pytest.raises(Stop):
        fit(make(), Crash())
    with pytest.raises(UserError, match="goes on from step 4; the weights of step 2 are gone"):
        fit(make(), capture=2)
    found = fit(make(), capture=2, captured=lambda _: None)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_training_that_begins_later_is_not_rewound_to_step_0():
    model = prune(small())
    model.compile("adam", "mse")
    start, mask = {n: v.numpy() for n, v in weights(model).items()}, random_mask(model)
    model.fit(X, Y, 4, 2, verbose=0, callbacks=[Rewind(start, mask)])
    trained = {n: v.numpy() for n, v in weights(model).items()}
    state = [v.numpy() for v in model.optimizer.variables]
    for step in (0, 3):
        rewind = Rewind(start, mask, step=step)
        with pytest.raises(UserError, match=f"begins at epoch 2 .*step {step} .*leave Rewind out"):
            model.fit(X, Y, 4, 4, initial_epoch=2, verbose=0, callbacks=[rewind])
        for name, value in trained.items():
            np.testing.assert_array_equal(weights(model)[name], value)
        for variable, value in zip(model.optimizer.variables, state, strict=True):
            np.testing.assert_array_equal(variable, value)
    model.fit(X, Y, 4, 4, initial_epoch=2, verbose=0, callbacks=[Rewind(start, mask, step=4)])


# --- Files, and models made of others --------------------------------------------------

READ = """
import sys
import lth_tf
keras = __import__("tensorflow").keras if sys.argv[1] == "tf" else __import__("tf_keras")
for path in sys.argv[2:]:
    model = keras.models.load_model(path)
    lth_tf.strip(model)
    print(path, sorted(lth_tf.get_mask(model)))
"""


@pytest.mark.parametrize("door", ["tf", *(["tf_keras"] if ALL else [])])  # a process each
@pytest.mark.filterwarnings("ignore:You are saving")
def test_a_fresh_process_reads_pruned_models(door, tmp_path):
    model = prune(keras.Sequential([keras.Input((6,)), layers.Dense(3, name="dense_4")]))
    paths = [str(tmp_path / name) for name in ("m.keras", "m.h5", "m")]
    for path in paths:
        model.save(path)
    ran = subprocess.run(
        [sys.executable, "-c", READ, door, *paths], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [f"{path} ['dense_4/kernel']" for path in paths]


def test_a_part_of_a_stripped_model_is_a_model():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(5, name="i")], name="inner")
    a = keras.Input((6,))
    model = keras.Model(a, layers.Dense(3, name="top")(layers.Dense(4, name="mid")(inner(a))))
    pruned = prune(model)
    set_mask(pruned, random_mask(pruned))
    for stripped in (strip(pruned), strip(prune(strip(pruned)))):
        part = keras.Model(stripped.inputs, stripped.get_layer("mid").output)
        expected = stripped.get_layer("mid")(stripped.get_layer("inner")(X))
        np.testing.assert_array_equal(part(X), expected)


def test_a_stripped_model_has_layers_that_were_added_to_the_pruned_one():
    pruned = prune(small())
    pruned.add(layers.Dense(2))
    assert strip(pruned)(X).shape == (8, 2)


def test_a_new_head_on_a_pruned_trunk_can_be_pruned():
    trunk = prune(small())
    set_mask(trunk, random_mask(trunk))
    whole = keras.Model(trunk.inputs, layers.Dense(4, name="head")(trunk.output))
    assert list(kernels(whole)) == ["a/kernel", "b/kernel"]
    pruned = prune(whole)
    mask = get_mask(pruned)
    assert mask.pop("head/kernel").all()
    assert all(np.array_equal(m, mask[n]) for n, m in get_mask(trunk).items())
    sparser = random_mask(pruned, 0.2, 1)
    set_mask(pruned, sparser)
    pruned.compile("adam", "mse")
    pruned.fit(X, Y[:, :4], verbose=0, callbacks=[Density()])
    assert list(kernels(strip(pruned))) == ["a/kernel", "b/kernel", "head/kernel"]
    with pytest.raises(UserError, match="pruned already"):
        prune(trunk)


# --- What is pruned --------------------------------------------------------------------


@keras.saving.register_keras_serializable("test_roads")
class Odd(layers.Layer):
    """Weights of other names, in a list, of rank 1."""

    def build(self, shape):
        self.matrix = self.add_weight("matrix", (shape[-1], 20))
        self.parts = [self.add_weight("part", (20, 20))]
        self.bias = self.add_weight("bias", (20,))
        super().build(shape)

    def call(self, x):
        return x @ self.matrix @ self.parts[0] + self.bias


class Names(layers.Layer):
    def build(self, shape):
        self.left, self.right = (self.add_weight(n, (shape[-1], 3)) for n in ("left", "right"))

    def get_prunable_weights(self):
        return [self.left]

    def call(self, x):
        return x @ (self.left + self.right)


def odd():
    return keras.Sequential([keras.Input((6,)), Odd(name="odd"), layers.Dense(3, name="top")])


def test_what_is_not_pruned_is_said():
    assert lth_tf.prunable(odd()) == [
        ("odd/matrix", (6, 20), False,
         "its attribute 'matrix' does not end in 'kernel'; select it by name (select=)"),
        ("odd/part", (20, 20), False,
         "no attribute of a layer (in a list?); set self.NAME = self.add_weight(...)"),
        ("odd/bias", (20,), False, "rank below 2 (a bias or scale)"),
        ("top/kernel", (20, 3), True, ""),
        ("top/bias", (3,), False, "rank below 2 (a bias or scale)"),
    ]  # fmt: skip
    with pytest.warns(UserWarning, match=r"masks 60 of 603 trained parameters.*odd/part .20, 20.*"):
        prune(odd())
    rows = {row.name: row for row in lth_tf.prunable(
        keras.Sequential([keras.Input((6,)), Names(name="n")])
    )}  # fmt: skip
    assert rows["n/left"].prunable and "get_prunable_weights" in rows["n/right"].why
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune(small())


def test_kernels_are_selected_by_name(tmp_path):
    model = prune(odd(), select=["odd/m*"])
    assert list(kernels(model)) == ["odd/matrix"]
    assert {row.name: row.why for row in lth_tf.prunable(model)}["top/kernel"] == "not selected"
    set_mask(model, random_mask(model))
    model.compile("adam", "mse")
    model.fit(X, Y[:, :3], verbose=0, callbacks=[Density()])
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(get_mask(loaded)) == ["odd/matrix"]
    np.testing.assert_array_equal(loaded(X), model(X))
    stripped = strip(model)
    assert list(kernels(stripped)) == list(kernels(prune(stripped))) == ["odd/matrix"]
    with pytest.raises(UserError, match="'x/.' fits none .*odd/matrix, odd/part, top/kernel"):
        prune(odd(), select="x/*")
    with pytest.raises(UserError, match="odd/part cannot be masked: no attribute"):
        prune(odd(), select=["*/kernel", "odd/part"])
