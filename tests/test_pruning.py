"""pruning: zeros stay zero, any model, any optimizer, any format; what cannot hold is refused."""

from __future__ import annotations

import collections

import numpy as np
import pytest

from lth_tf import pruning
from lth_tf.compat import keras, tf, tfmot
from lth_tf.errors import UserError
from lth_tf.pruning import (
    InvariantError,
    MaskedLayer,
    check,
    get_mask,
    kernels,
    plain,
    prune,
    set_mask,
    slots_of,
    strip,
    weights,
)
from lth_tf.pruning.slots import probe

layers, optimizers, regularizers = keras.layers, keras.optimizers, keras.regularizers


def random_mask(model, density=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return {n: (rng.random(k.shape) < density).astype(np.uint8) for n, k in kernels(model).items()}


def examples(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def is_zero(array):
    """+0.0, bit for bit."""
    return bool(np.all(array == 0) and not np.any(np.signbit(array)))


def small(**options):
    return keras.Sequential(
        [keras.Input((6,)), layers.Dense(5, "tanh", name="a", **options), layers.Dense(3, name="b")]
    )


def two_replicas():
    # Collectives of several strategies in one process would get in each other's way.
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


class Zeros(keras.callbacks.Callback):
    """Checks weights and slots after every step."""

    steps = 0

    def on_train_batch_end(self, batch, logs=None):
        mask, slots = get_mask(self.model), slots_of(self.model.optimizer, self.model)
        for name, kernel in kernels(self.model).items():
            assert is_zero(kernel.numpy()[mask[name] == 0]), (name, batch)
            for slot in slots[name]:
                assert not np.any(slot.numpy()[mask[name] == 0]), (slot.name, batch)
        self.steps += 1


def fit(model, optimizer, x, y, mask=None, batch_size=4, epochs=2, scope=None, **options):
    """Prunes at random, fits, and returns weights before and after."""
    with scope or tf.distribute.get_strategy().scope():
        model.compile(optimizer() if scope else optimizer, "mse", **options)
    set_mask(model, random_mask(model) if mask is None else mask)
    before = {n: v.numpy() for n, v in weights(model).items()}
    zeros = Zeros()
    model.fit(x, y, batch_size, epochs, verbose=0, shuffle=False, callbacks=[zeros])
    assert zeros.steps == epochs * len(y) // batch_size
    check(model, model.optimizer)
    return before, {n: v.numpy() for n, v in weights(model).items()}


def assert_trained(model, before, after):
    mask = get_mask(model)
    for name, m in mask.items():
        moved = before[name] != after[name]
        assert not moved[m == 0].any() and moved[m != 0].mean() > 0.9, name


# --- Zeros stay zero -------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda: optimizers.Adam(0.1, amsgrad=True),
    "adamw": lambda: optimizers.AdamW(0.1, weight_decay=0.1),
    "sgd": lambda: optimizers.SGD(0.1, weight_decay=0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9, clipnorm=0.1),
    "nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True, clipvalue=0.1),
    "rmsprop": lambda: optimizers.RMSprop(0.1, momentum=0.9, centered=True, global_clipnorm=0.1),
    "ema": lambda: optimizers.Adam(0.1, use_ema=True, ema_overwrite_frequency=3),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "legacy": lambda: optimizers.legacy.Adam(0.1),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_zero_in_fit_under_every_optimizer(name):
    model = prune(small())
    assert_trained(model, *fit(model, OPTIMIZERS[name](), examples(8, 6), examples(8, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_regularizer": regularizers.OrthogonalRegularizer(0.1)},
        {"kernel_regularizer": regularizers.L1L2(0.1, 0.1), "activity_regularizer": "l2"},
        {"kernel_constraint": keras.constraints.UnitNorm()},
    ],
)
def test_regularizers_and_constraints_do_not_leak(options):
    model = prune(small(**options))
    with plain(model):  # undoes what prune did to the regularizers, for as long as it lasts
        pass
    assert_trained(model, *fit(model, optimizers.Adam(0.1), examples(8, 6), examples(8, 3)))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_zeros_stay_zero_in_every_precision(policy):
    keras.mixed_precision.set_global_policy(policy)
    try:
        model = prune(small(kernel_regularizer=regularizers.OrthogonalRegularizer(0.1)))
        optimizer = optimizers.Adam(0.01, use_ema=True)
        if policy == "mixed_float16":
            optimizer = keras.mixed_precision.LossScaleOptimizer(optimizer)
        before, after = fit(model, optimizer, examples(8, 6), examples(8, 3))
        assert_trained(model, before, after)
        assert {v.dtype for v in after.values()} == {
            np.dtype("float64" if policy == "float64" else "float32")
        }
        assert all(len(s) == 3 for s in slots_of(model.optimizer, model).values())
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_zeros_stay_zero_under_xla():
    model = prune(small())
    x, y = examples(8, 6), examples(8, 3)
    assert_trained(model, *fit(model, optimizers.Adam(0.1), x, y, jit_compile=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_zeros_stay_zero_on_two_replicas(policy):
    strategy = two_replicas()
    keras.mixed_precision.set_global_policy(policy)
    try:
        with strategy.scope():
            model = small(kernel_regularizer=regularizers.OrthogonalRegularizer(0.1))
        model = prune(model)  # outside the scope: it follows the model
        x, y = examples(8, 6), examples(8, 3)
        before, after = fit(
            model, lambda: optimizers.Adam(0.1, use_ema=True), x, y, scope=strategy.scope()
        )
    finally:
        keras.mixed_precision.set_global_policy("float32")
    assert_trained(model, before, after)
    for kernel in kernels(model).values():
        one, other = (v.numpy() for v in getattr(kernel, "_variable", kernel).values)
        np.testing.assert_array_equal(one, other)
    with plain(model) as stripped:
        assert stripped.distribute_strategy is strategy


def test_zeros_stay_zero_in_a_loop_of_ones_own():
    model = prune(small(kernel_regularizer=regularizers.OrthogonalRegularizer(0.1)))
    optimizer = optimizers.AdamW(0.1)
    mask = random_mask(model)
    set_mask(model, mask, optimizer)
    x, y = examples(8, 6), examples(8, 3)
    before = {n: v.numpy() for n, v in weights(model).items()}

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2) + sum(model.losses)
        optimizer.minimize(loss, model.trainable_variables, tape)

    for _ in range(3):
        step()
        check(model, optimizer)
    assert_trained(model, before, {n: v.numpy() for n, v in weights(model).items()})
    # A second, sparser mask meets slots that exist.
    sparser = {n: m * random_mask(model, seed=1)[n] for n, m in mask.items()}
    set_mask(model, sparser, optimizer)
    check(model, optimizer)
    step()
    check(model, optimizer)


def test_set_mask_writes_positive_zeros():
    model = prune(small())
    kernel = kernels(model)["a/kernel"]
    for poison in (np.nan, -0.0, np.inf, -1.0):
        kernel.assign(np.full((6, 5), poison, np.float32))
        mask = random_mask(model)
        set_mask(model, mask)
        assert is_zero(kernel.numpy()[mask["a/kernel"] == 0])
        np.testing.assert_array_equal(kernel.numpy()[mask["a/kernel"] != 0], poison)


# --- Any model -------------------------------------------------------------------------


@keras.saving.register_keras_serializable("test_pruning")
class Pair(layers.Layer):
    """Two sublayers; makes one of its kernels in its first call only."""

    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.last, self.first = layers.Dense(units), layers.Dense(units)

    def build(self, shape):
        self.last.build([*shape[:-1], self.units])
        self.last.built = True
        super().build(shape)

    def call(self, x):
        return self.last(self.first(x))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Chosen(layers.Layer):
    """Names its prunable weights: not the kernel."""

    def build(self, shape):
        self.kernel = self.add_weight("kernel", (shape[-1], 4))
        self.matrix = self.add_weight("matrix", (4, 4))
        self.vector = self.add_weight("vector", (4,))
        self.fixed_kernel = self.add_weight("fixed_kernel", (4, 4), trainable=False)

    def get_prunable_weights(self):
        return [self.matrix, self.vector]

    def call(self, x):
        return (x @ self.kernel @ self.matrix + self.vector) @ self.fixed_kernel


class Picky(layers.Layer):
    """Depends on how exactly Keras calls it."""

    def build(self, shape):
        self.kernel = self.add_weight("kernel", (shape[-1], 4))
        self.fixed_kernel = self.add_weight("fixed_kernel", (4, 4), trainable=False)

    def call(self, query, scale, *, training=True, mask=None, **kwargs):
        assert not kwargs
        y = tf.matmul(query, self.kernel) * (scale + (10.0 if training else 0.0))
        if tf.reduce_sum(y) > 0:  # for autograph
            y = y + 1.0
        self.add_loss(tf.reduce_mean(y))
        return y if mask is None else y * tf.cast(mask, y.dtype)[..., None]


class Branches(keras.Model):
    """Layers in attributes, lists, dicts and models; one used twice, one without a kernel."""

    def __init__(self):
        super().__init__()
        self.scale = Chosen()
        self.norm = layers.BatchNormalization()
        self.blocks = [layers.Dense(4), layers.Dropout(0.1), (layers.Dense(4), layers.ReLU())]
        self.again = self.blocks[0]
        self.heads = {"z": layers.Dense(3), "a": Single(), "m": small()}
        self.net = keras.Sequential([layers.Dense(6), layers.Dense(6)])
        self.tracker = keras.metrics.Mean()
        self.free_kernel = self.add_weight("kernel", (4, 4))

    def call(self, x, training=False):
        x = self.norm(self.scale(x), training=training)
        x = self.again(self.blocks[1](self.blocks[0](x), training=training))
        x = self.blocks[2][1](self.blocks[2][0](x)) @ self.free_kernel
        return self.heads["z"](x) + self.heads["a"](x) + self.heads["m"](self.net(x))


class Single(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def functional():
    a, b = keras.Input((6,)), keras.Input((3, 6))
    shared = layers.Dense(4)
    x = tf.nn.relu(shared(a)) * 2.0 + layers.GlobalAveragePooling1D()(
        layers.TimeDistributed(shared)(b)  # one layer, masked in two places
    )
    x = layers.Concatenate()([shared(a), x, layers.Flatten()(b)])
    return keras.Model([a, b], [layers.Dense(3)(x), layers.Dense(2)(x)])


def nested():
    def block(name):
        return keras.Sequential(
            [keras.Input((6,)), layers.Dense(6, "relu", name="d"), layers.Dense(6, name="e")], name
        )

    a = keras.Input((6,))
    both = keras.Model(a, block("one")(a) + block("two")(a))
    b = keras.Input((6,))
    return keras.Model(b, layers.Dense(3)(Single()(both(both(b)))))


def sequence():
    ids, state = keras.Input((5,), dtype=tf.int32), keras.Input((4,))
    x = layers.Embedding(9, 4, mask_zero=True)(ids)
    x = layers.Conv1D(4, 3, padding="same")(x)  # drops the mask, as Keras does
    y = layers.Embedding(9, 4, mask_zero=True)(ids)
    y = Picky()(y, 2.0, training=False)
    y = layers.MultiHeadAttention(2, 3)(y, value=x, use_causal_mask=True)
    y = layers.Bidirectional(layers.SimpleRNN(2, return_sequences=True))(y)
    y = layers.GRU(4)(y, initial_state=state)
    return keras.Model([ids, state], layers.Dense(3)(y))


def images():
    a = keras.Input((8, 8, 2))
    x = layers.GroupNormalization(2)(layers.Conv2D(2, 3, name="stem/conv")(a))
    x = layers.SeparableConv2D(3, 3, activity_regularizer="l2")(layers.DepthwiseConv2D(2)(x))
    x = layers.BatchNormalization()(layers.Conv2DTranspose(2, 2)(x))
    x = layers.EinsumDense("abcd,de->abce", (None, None, 3))(x)
    return keras.Model(a, layers.Dense(3)(layers.Flatten()(layers.Rescaling(0.5)(x))))


def custom():
    a = keras.Input((6,))
    return keras.Model(a, layers.Dense(3)(Picky()(query=Chosen()(Pair()(a)), scale=1.0)))


def deferred():
    model = keras.Sequential([layers.Dense(4), layers.Dense(3)])
    model(examples(2, 6))
    return model


def subclassed():
    model = Branches()
    model(examples(2, 6))
    return model


IDS = np.random.default_rng(0).integers(0, 9, (8, 5))
MODELS = {
    "functional": (functional, [examples(8, 6), examples(8, 3, 6)], 3),
    "nested": (nested, examples(8, 6), 6),
    "sequence": (sequence, [IDS, examples(8, 4)], 13),
    "images": (images, examples(8, 8, 8, 2), 7),
    "custom": (custom, examples(8, 6), 6),
    "deferred": (deferred, examples(8, 6), 2),
    "subclassed": (subclassed, examples(8, 6), 10),
}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_pruned_trained_and_stripped(name):
    make, x, count = MODELS[name]
    model = make()
    names, outputs = list(weights(model)), model(x)
    assert len(kernels(model)) == count
    assert {id(v) for v in model.trainable_variables} <= {id(v) for v in weights(model).values()}

    pruned = prune(model)
    assert list(weights(pruned)) == names
    assert list(get_mask(pruned)) == list(kernels(pruned))
    wrapped = [v.layer for v in pruned._flatten_layers() if isinstance(v, MaskedLayer)]
    assert len({id(layer) for layer in wrapped}) == len(wrapped)
    assert all(m.dtype == np.uint8 and m.all() for m in get_mask(pruned).values())
    tf.nest.map_structure(np.testing.assert_array_equal, pruned(x), outputs)

    y = tf.nest.map_structure(lambda o: np.ones(o.shape, np.float32), outputs)
    start = {n: v.numpy() for n, v in weights(pruned).items()}
    fit_on(pruned, x, y)
    trained = {n: v.numpy() for n, v in weights(pruned).items()}
    assert any((start[n] != trained[n]).any() for n in kernels(pruned))

    mask, outputs = get_mask(pruned), pruned(x)
    with pytest.raises(ZeroDivisionError), plain(pruned) as stripped:
        assert not any(isinstance(v, MaskedLayer) for v in stripped._flatten_layers())
        assert list(weights(stripped)) == names
        tf.nest.map_structure(np.testing.assert_array_equal, stripped(x), outputs)
        raise ZeroDivisionError
    assert all(np.array_equal(mask[n], m) for n, m in get_mask(pruned).items())
    fit_on(pruned, x, y, mask)

    outputs = pruned(x)
    stripped = strip(pruned)
    assert list(weights(stripped)) == names
    tf.nest.map_structure(np.testing.assert_array_equal, stripped(x), outputs)
    assert list(get_mask(prune(stripped))) == list(mask)  # and round again


def fit_on(model, x, y, mask=None):
    """Fits, checking after every step."""
    if mask is None:
        mask = random_mask(model)
        model.compile(optimizers.Adam(0.01), "mse")
        set_mask(model, mask)
    model.fit(x, y, 4, verbose=0, callbacks=[Zeros()])
    check(model, model.optimizer)


@pytest.mark.parametrize("name", MODELS)
def test_names_are_unique_paths_that_do_not_count_the_layers_of_the_process(name):
    make = MODELS[name][0]
    first, second = make(), make()
    assert [v.name for v in first.weights] != [v.name for v in second.weights] or name == "nested"
    assert list(weights(first)) == list(weights(second))


def test_names():
    a = keras.Input((5, 4))
    x = layers.RNN([layers.SimpleRNNCell(3), layers.LSTMCell(3)], return_sequences=True)(a)
    x = keras.Sequential([layers.Conv1DTranspose(2, 2), layers.PReLU()])(x)
    x = layers.Bidirectional(layers.GRU(2))(layers.MultiHeadAttention(1, 2)(x, x))
    x = layers.Dense(2)(layers.Dense(2, name="dense_7")(layers.Dense(2, name="my_dense_7")(x)))
    pair = "kernel", "recurrent_kernel"
    assert list(kernels(keras.Model(a, x))) == [
        *(f"rnn/stacked_rnn_cells/{c}_cell/{k}" for c in ("simple_rnn", "lstm") for k in pair),
        "sequential/conv1d_transpose/kernel",
        *(f"multi_head_attention/{p}/kernel" for p in ("query", "key", "value")),
        "multi_head_attention/attention_output/kernel",
        *(f"bidirectional/{d}_gru/gru_cell/{k}" for d in ("forward", "backward") for k in pair),
        "my_dense_7/kernel",
        "dense_7/kernel",  # as its user called it
        "dense/kernel",
    ]

    class Same(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(2, name=n) for n in ("a", "a_1", "a", "a/b")]
            self.more = keras.Sequential([layers.Dense(2, name="b")], "a")

        def call(self, x):
            return sum(part(x) for part in [*self.parts, self.more])

    model = Same()
    model(examples(2, 2))
    assert len(weights(model)) == 10
    assert list(kernels(model)) == [
        "a/kernel", "a_1/kernel", "a_2/kernel", "a/b/kernel", "a_3/b/kernel",
    ]  # fmt: skip


def test_kinds():
    assert pruning.kinds(images()) == {
        "stem/conv/kernel": "conv",
        "depthwise_conv2d/depthwise_kernel": "conv",
        "separable_conv2d/depthwise_kernel": "conv",
        "separable_conv2d/pointwise_kernel": "conv",
        "conv2d_transpose/kernel": "conv",
        "einsum_dense/kernel": "dense",
        "dense/kernel": "output",
    }


def test_a_frozen_layer_stays_frozen_and_is_masked():
    model = small(trainable=False)
    pruned = prune(model)
    before, after = fit(pruned, optimizers.Adam(0.1), examples(8, 6), examples(8, 3))
    np.testing.assert_array_equal(before["a/kernel"], after["a/kernel"])
    assert len(pruned.trainable_variables) == 2
    assert {n: len(s) for n, s in slots_of(pruned.optimizer, pruned).items()} == {
        "a/kernel": 0, "b/kernel": 2,
    }  # fmt: skip


def test_a_stateful_layer_can_be_reset():
    model = keras.Sequential(
        [keras.Input(batch_shape=(2, 5, 3)), layers.LSTM(2, stateful=True), layers.Dense(2)]
    )
    pruned, x = prune(model), examples(2, 5, 3)
    first, second = pruned(x).numpy(), pruned(x).numpy()
    pruned.reset_states()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(pruned(x), first)


def test_variables_outside_autocasting_keep_their_dtype():
    class Wide(layers.Layer):
        def __init__(self):
            super().__init__(autocast=False)

        def build(self, shape):
            self.kernel = self.add_weight("kernel", (6, 3), experimental_autocast=False)

        def call(self, x):
            assert self.kernel.dtype == x.dtype == tf.float32
            return tf.matmul(x, self.kernel)

    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = keras.Sequential([keras.Input((6,)), Wide()])
    finally:
        keras.mixed_precision.set_global_policy("float32")
    x = examples(2, 6)
    np.testing.assert_array_equal(prune(model)(x), model(x))


def test_own_training_steps_are_kept():
    class Own(keras.Model):
        def train_step(self, data):
            return {"loss": tf.constant(42.0)}

    a = keras.Input((6,))
    pruned = prune(Own(a, layers.Dense(3)(a)))
    pruned.compile()
    assert pruned.fit(examples(4, 6), verbose=0).history == {"loss": [42.0]}


def test_nothing_traced_before_is_used_again():
    class Score(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            with plain(self.model) as stripped:
                stripped.predict(x, verbose=0)

    x, y = examples(8, 6), examples(8, 3)
    model = Single()
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    prune(model)
    set_mask(model, random_mask(model))
    model.fit(x, y, epochs=2, verbose=0, callbacks=[Score(), Zeros()])
    outputs = model.predict(x, verbose=0)
    assert strip(model) is model
    np.testing.assert_array_equal(model.predict(x, verbose=0), outputs)
    model.fit(x, y, verbose=0)
    assert all(k.numpy().all() for k in kernels(model).values())


# --- Regularization --------------------------------------------------------------------


def test_regularization_losses_are_the_original_ones():
    model = small(
        kernel_regularizer=regularizers.OrthogonalRegularizer(), activity_regularizer="l1"
    )
    x = examples(8, 6)
    model(x)
    before = [float(v) for v in model.losses]
    callables = list(model.get_layer("a")._callable_losses)
    pruned = prune(model)
    pruned(x)
    assert [float(v) for v in pruned.losses] == before
    set_mask(pruned, random_mask(pruned))
    pruned(x)
    masked = [float(v) for v in pruned.losses]
    assert masked != before
    stripped = strip(pruned)
    stripped(x)
    assert [float(v) for v in stripped.losses] == masked
    assert stripped.get_layer("a")._callable_losses == callables


# --- tfmot and files -------------------------------------------------------------------


def test_tfmot_accepts_a_pruned_model(tmp_path):
    model = prune(nested_for_files())
    mask = random_mask(model)
    model.compile("adam", "mse")
    set_mask(model, mask)
    x = examples(8, 5, 4)
    sparsity = tfmot.sparsity.keras
    model.fit(
        x,
        model(x),
        verbose=0,
        callbacks=[
            sparsity.UpdatePruningStep(),
            sparsity.PruningSummaries(str(tmp_path / "logs")),
            Zeros(),
        ],
    )
    assert list((tmp_path / "logs").rglob("*tfevents*"))
    stripped = sparsity.strip_pruning(model)
    assert not any(isinstance(v, MaskedLayer) for v in stripped._flatten_layers())
    np.testing.assert_array_equal(stripped(x), model(x))
    model.save(tmp_path / "m.keras")
    with sparsity.prune_scope():
        loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_same(loaded, model, x)


def nested_for_files():
    """A layer in a layer, kernels made in the first call, a model in a model."""
    a = keras.Input((4,))
    inner = keras.Model(a, layers.Dense(4)(Pair()(a)))
    b = keras.Input((5, 4))
    x = layers.MultiHeadAttention(1, 2)(b, b)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    x = layers.BatchNormalization()(inner(layers.SimpleRNN(4, kernel_regularizer="l2")(x)))
    return keras.Model(b, layers.Dense(3)(x))


def assert_same(loaded, model, x):
    mask, again = get_mask(model), get_mask(loaded)
    assert list(mask) == list(again)
    for name in mask:
        np.testing.assert_array_equal(mask[name], again[name], name)
    np.testing.assert_array_equal(loaded(x), model(x))
    check(loaded)


@pytest.fixture(scope="module")
def for_files():
    model, x = prune(nested_for_files()), examples(8, 5, 4)
    set_mask(model, random_mask(model))
    model.compile(optimizers.Adam(0.1), "mse")
    model.fit(x, model(x) + 1.0, verbose=0)
    return model, x


@pytest.mark.sampled(1)
@pytest.mark.parametrize("path", ["m.keras", "m.h5", "saved_model"])
@pytest.mark.filterwarnings("ignore:You are saving")
def test_saved_models_keep_masks(path, for_files, tmp_path):
    model, x = for_files
    keras.models.save_model(model, tmp_path / path)
    loaded = keras.models.load_model(tmp_path / path)
    assert_same(loaded, model, x)
    loaded.fit(x, x[:, 0, :3], 4, verbose=0, callbacks=[Zeros()])  # slots were saved, too
    np.testing.assert_array_equal(strip(loaded)(x), loaded(x))


@pytest.mark.parametrize("path", ["w", "w.h5", "w.weights.h5"])
def test_saved_weights_keep_masks(path, for_files, tmp_path):
    model, x = for_files
    model.save_weights(tmp_path / path)
    fresh = prune(nested_for_files())
    fresh.load_weights(tmp_path / path)
    assert_same(fresh, model, x)


@pytest.mark.parametrize("path", ["w", "w.h5", "w.weights.h5"])
def test_saved_weights_of_a_subclassed_model_keep_masks(path, tmp_path):
    x = examples(2, 6)
    model, fresh = prune(subclassed()), prune(subclassed())
    set_mask(model, random_mask(model))
    model.save_weights(tmp_path / path)
    fresh.load_weights(tmp_path / path)
    assert_same(fresh, model, x)


def test_checkpoints_keep_masks(for_files, tmp_path):
    model, x = for_files
    saved = tf.train.Checkpoint(model=model).save(tmp_path / "c")
    fresh = prune(nested_for_files())
    tf.train.Checkpoint(model=fresh).restore(saved).assert_existing_objects_matched()
    assert_same(fresh, model, x)


def test_a_stripped_model_is_a_plain_one(tmp_path):
    model = prune(small(kernel_regularizer=regularizers.OrthogonalRegularizer()))
    set_mask(model, random_mask(model))
    x = examples(2, 6)
    model(x)
    stripped = strip(model)
    stripped.save(tmp_path / "saved_model")
    stripped.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "saved_model")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert "lth_tf" not in stripped.to_json()


# --- Slots -----------------------------------------------------------------------------


def test_set_mask_before_and_after_slots_exist():
    model = prune(small())
    optimizer = optimizers.Adam(0.1)
    assert slots_of(optimizer, model) == {"a/kernel": [], "b/kernel": []}
    set_mask(model, random_mask(model), optimizer)
    optimizer.build(model.trainable_variables)
    slots = slots_of(optimizer, model)["a/kernel"]
    assert len(slots) == 2
    for slot in slots:
        slot.assign(np.full((6, 5), np.nan, np.float32))
    with pytest.raises(InvariantError, match="m/a/kernel"):
        check(model, optimizer)
    set_mask(model, get_mask(model), optimizer)
    check(model, optimizer)
    assert np.isnan(slots[0].numpy()).sum() == get_mask(model)["a/kernel"].sum()


@pytest.mark.parametrize("subset", [False, True])
def test_slots_are_found_where_names_collide(subset):
    def block(name):
        return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="d")], name)

    a = keras.Input((4,))
    model = prune(keras.Model(a, block("two")(block("one")(a))))
    collections_of = collections.Counter(v.name for v in model.trainable_variables)
    assert max(collections_of.values()) == 2
    trained = model.trainable_variables[::-1]
    trained = [v for v in trained if v is not kernels(model)["one/d/kernel"]] if subset else trained
    optimizer = optimizers.Adam(0.1)
    x = examples(4, 4)
    for mask in (random_mask(model), random_mask(model, 0.3, 1)):
        set_mask(model, mask, optimizer)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        optimizer.minimize(loss, trained, tape)
        check(model, optimizer)
    counts = {n: len(s) for n, s in slots_of(optimizer, model).items()}
    assert counts == {"one/d/kernel": 0 if subset else 2, "two/d/kernel": 2}


@pytest.mark.parametrize("name", ["Ftrl", "Adafactor"])  # NaN; slots that mix the weights
def test_optimizers_whose_state_does_not_survive_are_refused(name):
    model = prune(small())
    optimizer = keras.mixed_precision.LossScaleOptimizer(getattr(optimizers, name)())
    with pytest.raises(UserError, match=f"{name}.*use adam"):
        set_mask(model, random_mask(model), optimizer)
    assert all(m.all() for m in get_mask(model).values())


def test_all_other_optimizers_of_keras_are_accepted():
    for name in ("Adadelta", "Adamax", "Lion", "Nadam", "RMSprop"):
        assert probe(getattr(optimizers, name)()) == (True, True)
    assert probe(optimizers.Adagrad()) == (True, False)
    keras.mixed_precision.set_global_policy("float64")
    try:
        pruning.require_maskable(optimizers.Adam(0.1, beta_1=0.8))
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_an_optimizer_that_hides_its_slots_is_refused():
    class Hidden(optimizers.Optimizer):
        def __init__(self, learning_rate=0.1):
            super().__init__("hidden")
            self._learning_rate = self._build_learning_rate(learning_rate)

        def build(self, variables):
            super().build(variables)
            if not hasattr(self, "_m"):
                self._m = {
                    self._var_key(v): self.add_variable_from_reference(v, "m") for v in variables
                }

        def update_step(self, gradient, variable):
            m = self._m[self._var_key(variable)]
            m.assign(0.9 * m + gradient)
            variable.assign_sub(0.1 * m)

        def get_config(self):
            return {"learning_rate": 0.1}

    with pytest.raises(UserError, match="Hidden"):
        pruning.require_maskable(Hidden())


# --- Errors ----------------------------------------------------------------------------


def test_keras_3_models_are_refused():
    import keras as keras_3

    model = keras_3.Sequential([keras_3.Input((4,)), keras_3.layers.Dense(2)])
    with pytest.raises(UserError, match="Keras 3 model.*tf_keras.*set_weights"):
        prune(model)


def refused(make):
    return pytest.param(make, id=make.__name__)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: 3, "takes a tf_keras model, not int"),
        (lambda: layers.Dense(2), "not Dense"),
        (lambda: keras.Sequential([layers.Dense(2)]), "is not built"),
        (lambda: Single(), "is not built.*call it on a batch"),
        (lambda: unused(), "not built: the kernels of late"),
        (
            lambda: keras.Sequential([keras.Input((4,)), layers.Flatten()]),
            "nothing to prune.*Flatten",
        ),
        (lambda: prune(small()), "pruned already; use set_mask"),
        (lambda: compiled_call(), "of Compiled 'c' is a @tf.function"),
        (lambda: listed(), "names.*in get_prunable_weights.*as an attribute"),
        (lambda: with_module(), "trains.*tf.Module"),
        (lambda: with_loss(), "add_loss"),
        (lambda: own_step(), "OwnStep.*methods of its own .train_step."),
    ],
)
def test_what_cannot_be_pruned_is_refused(make, message):
    with pytest.raises(UserError, match=message):
        prune(make())


def unused():
    class Unused(Single):
        def __init__(self):
            super().__init__()
            self.late = layers.Dense(2, name="late")

    model = Unused()
    model(examples(2, 4))
    return model


def compiled_call():
    class Compiled(layers.Dense):
        @tf.function
        def call(self, x):
            return tf.matmul(x, self.kernel)

    return keras.Sequential([keras.Input((4,)), Compiled(2, name="c")])


def listed():
    class Listed(layers.Layer):
        def build(self, shape):
            self.parts = [self.add_weight("w", (4, 4))]

        def get_prunable_weights(self):
            return self.parts

        def call(self, x):
            return x @ self.parts[0]

    return keras.Sequential([keras.Input((4,)), Listed(), layers.Dense(2)])


def with_module():
    class Module(tf.Module):
        def __init__(self):
            self.dense = layers.Dense(3)

    class Outer(Single):
        def __init__(self):
            super().__init__()
            self.module = Module()

        def call(self, x):
            return self.dense(self.module.dense(x))

    model = Outer()
    model(examples(2, 4))
    return model


def with_loss():
    model = small()
    model.add_loss(tf.reduce_mean(model.outputs[0]))
    return model


def own_step():
    class OwnStep(keras.Model):
        def __init__(self):
            a = keras.Input((4,))
            super().__init__(a, layers.Dense(2)(a))

        def train_step(self, data):
            return {}

    return OwnStep()


def test_a_refused_model_is_left_as_it_was():
    class Outer(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.second = Single(), own_step()

        def call(self, x):
            return self.first(x)

    model = Outer()
    model(examples(2, 4))
    with pytest.raises(UserError, match="OwnStep"):
        prune(model)
    assert not any(isinstance(v, MaskedLayer) for v in model._flatten_layers())


def test_replicas_that_wait_inside_a_masked_layer_are_refused():
    class Synchronized(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = layers.Dense(4), layers.BatchNormalization(synchronized=True)

        def call(self, x):
            return self.norm(self.dense(x))

    with two_replicas().scope():
        model = prune(keras.Sequential([keras.Input((4,)), Synchronized()]))
        model.compile("sgd", "mse")
    with pytest.raises(Exception, match="make it a keras.Model"):
        model.fit(examples(4, 4), examples(4, 4), 4, verbose=0)


def test_masks_that_do_not_fit_are_refused():
    model = prune(small())
    mask = random_mask(model)
    for wrong, message in [
        ({"a/kernel": mask["a/kernel"]}, "lacks .'b/kernel'."),
        ({**mask, "c/kernel": mask["a/kernel"]}, "has .'c/kernel'., which the model has not"),
        ({**mask, "a/kernel": mask["a/kernel"].T}, r"shape \(5, 6\), the model's is \(6, 5\)"),
        ({**mask, "a/kernel": mask["a/kernel"] * 2}, "values other than 0 and 1"),
        ({**mask, "a/kernel": mask["a/kernel"] * np.nan}, "values other than 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message):
            set_mask(model, wrong)
    assert all(m.all() for m in get_mask(model).values())
    with pytest.raises(UserError, match="not pruned; call prune"):
        set_mask(small(), mask)
    with pytest.raises(UserError, match="set of weights lacks"):
        pruning.assign(model, mask)


def test_an_assign_to_a_pruned_weight_is_found():
    model = prune(small())
    set_mask(model, random_mask(model))
    kernel = kernels(model)["a/kernel"]
    for value in (1.0, np.nan):
        kernel.assign(np.full((6, 5), value, np.float32))
        pruned = int((get_mask(model)["a/kernel"] == 0).sum())
        for find in (check, strip, lambda m: plain(m).__enter__()):
            with pytest.raises(InvariantError, match=f"{pruned} of {pruned} pruned.*set_mask"):
                find(model)
    set_mask(model, get_mask(model))
    check(model)


def test_assign_sets_all_weights_masked():
    model = prune(small())
    values = {n: np.full(v.shape, 2.0) for n, v in weights(model).items()}
    mask = random_mask(model)
    pruning.assign(model, values, mask)
    assert np.array_equal(kernels(model)["a/kernel"].numpy(), 2.0 * mask["a/kernel"])
    assert (weights(model)["a/bias"].numpy() == 2).all()
