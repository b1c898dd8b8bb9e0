"""scorers: each score against brute force, the model untouched, and what cannot be scored."""

import functools

import numpy as np
import pytest

import lth_tf
from lth_tf import masks, pruning
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.models import MODELS
from lth_tf.scopes import SCOPES
from lth_tf.scorers import LOSSES, SCORERS, TiedScores, one_shot_mask, score
from lth_tf.scorers.network import Network, Reused

layers = keras.layers
RNG = np.random.default_rng(1)
X, Y = RNG.normal(size=(12, 6, 6, 2)), (np.arange(12) % 3).astype(np.int32)


@pytest.fixture(autouse=True)
def float32():
    yield
    keras.mixed_precision.set_global_policy("float32")


def net(dtype="float64", norm=True, softmax=False, bias=True):
    """Convolution, BatchNormalization of rank 4 and 2, Dense; smooth; weights far from special."""
    keras.mixed_precision.set_global_policy(dtype)
    normalise = layers.BatchNormalization if norm else lambda name: layers.Activation("linear")
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2), dtype="float64" if dtype == "float64" else "float32"),
            layers.Conv2D(3, 3, name="conv", use_bias=bias),
            normalise(name="norm1"),
            layers.Activation("softplus"),
            layers.Flatten(),
            layers.Dense(5, name="fc", use_bias=bias),
            normalise(name="norm2"),
            layers.Activation("softplus"),
            layers.Dense(
                3, name="output", use_bias=bias, dtype="float32" if "mixed" in dtype else None,
                activation="softmax" if softmax else None,
            ),
        ]
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for variable in model.variables:
        value = rng.normal(size=variable.shape) * 0.5
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.name else value)
    keras.mixed_precision.set_global_policy("float32")
    return model


@functools.cache
def oracle(train, temperature=1.0):
    """Returns (w, g, H g) of `net`, float64, H in full; BatchNormalization written by hand."""
    model, x, y = net(), X, Y
    fixed = {n: tf.constant(v.numpy(), tf.float64) for n, v in pruning.weights(model).items()}
    kernels = list(pruning.kernels(model))
    cuts = np.cumsum([fixed[k].numpy().size for k in kernels])[:-1]

    def loss(flat):
        p = dict(fixed)
        for name, part in zip(kernels, tf.split(flat, np.diff([0, *cuts, len(flat)])), strict=True):
            p[name] = tf.reshape(part, fixed[name].shape)

        def normalised(h, name, axes):
            if name + "/gamma" not in p:
                return h
            if train:
                mean = tf.reduce_mean(h, axes)
                variance = tf.reduce_mean((h - mean) ** 2, axes)
            else:
                mean, variance = p[name + "/moving_mean"], p[name + "/moving_variance"]
            return (h - mean) / tf.sqrt(variance + 1e-3) * p[name + "/gamma"] + p[name + "/beta"]

        h = tf.nn.conv2d(x, p["conv/kernel"], 1, "VALID") + p["conv/bias"]
        h = tf.math.softplus(normalised(h, "norm1", [0, 1, 2]))
        h = tf.reshape(h, (len(x), -1)) @ p["fc/kernel"] + p["fc/bias"]
        h = tf.math.softplus(normalised(h, "norm2", [0]))
        z = (h @ p["output/kernel"] + p["output/bias"]) / temperature
        return tf.reduce_mean(tf.reduce_logsumexp(z, -1) - tf.gather(z, y, batch_dims=1))

    flat = tf.concat([tf.reshape(fixed[k], [-1]) for k in kernels], 0)
    with tf.GradientTape() as outer:
        outer.watch(flat)
        with tf.GradientTape() as inner:
            inner.watch(flat)
            value = loss(flat)
        gradient = inner.gradient(value, flat)
    product = tf.linalg.matvec(outer.jacobian(gradient, flat), gradient)
    return [
        {
            k: part.reshape(fixed[k].shape)
            for k, part in zip(kernels, np.split(v.numpy(), cuts), strict=True)
        }
        for v in (flat, gradient, product)
    ]


def error(scores, wanted):
    """The largest difference, relative to the largest score of the network."""
    largest = max(np.abs(w).max() for w in wanted.values())
    return max(np.abs(scores[n] - w).max() for n, w in wanted.items()) / largest


def state(model):
    return {n: v.numpy().copy() for n, v in pruning.weights(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# --- Against brute force ---


@pytest.mark.sampled(1)
@pytest.mark.parametrize("batch_norm", ["train", "eval"])
@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_w_times_the_hessian_times_the_gradient(batch_norm, temperature):
    model = net()
    w, _, product = oracle(batch_norm == "train", temperature)
    wanted = {n: w[n] * product[n] for n in w}
    options = {"batch_norm": batch_norm, "temperature": temperature}
    scores = score(model, "grasp", [(X, Y)], **options)
    assert all(s.dtype == np.float64 for s in scores.values())
    assert error(scores, wanted) < 1e-8
    single = score(net("float32"), "grasp", [(X, Y)], **options)
    assert all(s.dtype == np.float32 for s in single.values())
    assert error(single, wanted) < 1e-4
    size = score(model, "grasp", [(X, Y)], variant="absolute", **options)
    assert all(np.array_equal(size[n], np.abs(s)) for n, s in scores.items())


@pytest.mark.sampled(1)
@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_snip_is_the_share_of_w_times_the_gradient(batch_norm):
    w, g, _ = oracle(batch_norm == "train")
    total = sum(np.abs(w[n] * g[n]).sum() for n in w)
    wanted = {n: np.abs(w[n] * g[n]) / total for n in w}
    assert error(score(net(), "snip", [(X, Y)], batch_norm=batch_norm), wanted) < 1e-8
    assert error(score(net("float32"), "snip", [(X, Y)], batch_norm=batch_norm), wanted) < 1e-4


def test_the_defaults_are_the_papers():
    model = net("float32")
    grasp = score(model, "grasp", [(X, Y)], batch_norm="train", temperature=200.0, variant="paper")
    assert same(score(model, "grasp", [(X, Y)]), grasp)
    snip = score(model, "snip", [(X, Y)], batch_norm="eval", variant="paper")
    assert same(score(model, "snip", [(X, Y)]), snip)


def test_keras_own_unfused_normalization_would_be_wrong():
    """Why BatchNormalization is computed here: the fault is in TensorFlow, and is still there."""
    model = net()
    w, _, product = oracle(True)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            logits = model(X, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits))
        kernels = pruning.kernels(model)
        gradient = inner.gradient(loss, kernels)
        along = tf.add_n([tf.reduce_sum(g * tf.stop_gradient(g)) for g in gradient.values()])
    keras_product = outer.gradient(along, kernels)
    assert error({n: w[n] * h.numpy() for n, h in keras_product.items()},
                 {n: w[n] * product[n] for n in w}) > 1e-3  # fmt: skip


class OwnNormalization(layers.Layer):
    def call(self, x):
        mean, variance = tf.nn.moments(x, [0], keepdims=True)
        return (x - mean) / tf.sqrt(variance + 0.1)


def test_a_layer_of_ones_own_with_the_fault_is_refused_by_grasp_and_fine_for_snip():
    model = keras.Sequential(
        [keras.Input((4, 4, 2)), layers.Conv2D(4, 3), OwnNormalization(), layers.Flatten(),
         layers.Dense(2)]
    )  # fmt: skip
    x, y = X[:, :4, :4], Y % 2
    with pytest.raises(UserError, match=r"tf.nn.moments .*StopGradient"):
        score(model, "grasp", [(x, y)])
    assert score(model, "snip", [(x, y)])


def test_the_official_grasp_halves_by_class_adds_up_and_redraws_dense_kernels():
    model, order = net(), np.argsort(Y, kind="stable")
    halves = [order[:6], order[6:]]
    drawn = SCORERS["grasp"].__globals__["_redrawn"](
        {n: v.numpy() for n, v in pruning.kernels(model).items()}, 5
    )
    before = state(model)
    assert np.array_equal(drawn["conv/kernel"], before["conv/kernel"])
    assert abs(drawn["fc/kernel"].std() / (2 / sum(drawn["fc/kernel"].shape)) ** 0.5 - 1) < 0.2
    twin = net()
    pruning.assign(twin, {**before, **drawn})
    # H = H1 + H2 and g = g1 + g2, so H g comes from the loss that is their sum: twice the mean.
    network = Network(twin, batch_norm="train")
    parts = [(X[h], Y[h]) for h in halves]
    product = network.hessian_gradient(drawn, parts, LOSSES["cross_entropy"], temperature=200.0)
    wanted = {n: 4 * drawn[n] * p for n, p in product.items()}
    scores = score(model, "grasp", [(X, Y)], variant="official", seed=5)
    assert error(scores, wanted) < 1e-12 and same(before, state(model))
    assert error(scores, score(model, "grasp", [(X, Y)])) > 0.1


def test_the_official_snip_draws_a_variance_of_one_over_the_fan_in():
    redrawn = SCORERS["snip"].__globals__["_redrawn"]
    w = redrawn({"conv": np.ones((3, 3, 64, 128)), "fc": np.ones((700, 300))}, 0)
    for name, fan_in in (("conv", 576), ("fc", 700)):
        assert abs(w[name].var() * fan_in - 1) < 0.02
        assert np.abs(w[name]).max() <= 2 / 0.8796 / fan_in**0.5


def test_the_official_snip_scores_weights_that_are_not_trained():
    model = net()
    first = score(model, "snip", [(X, Y)], variant="official", seed=1)
    assert error(first, score(model, "snip", [(X, Y)])) > 0.1
    assert error(first, score(model, "snip", [(X, Y)], variant="official", seed=2)) > 0.1
    assert same(first, score(model, "snip", [(X, Y)], variant="official", seed=1))


def test_another_loss_gives_other_scores():
    assert error(
        score(net(), "grasp", [(X, Y)], loss=LOSSES["squared_error"]),
        score(net(), "grasp", [(X, Y)]),
    ) > 0.1  # fmt: skip
    logits = np.array([[1.0, 2.0, 0.0]])
    assert LOSSES["squared_error"](np.array([1]), tf.constant(logits)).numpy() == [1 + 1]


# --- Micro-batches, precision, and the model untouched ---


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("norm", "batch_norm"), [(True, "eval"), (False, "train")])
@pytest.mark.parametrize("scorer", ["grasp", "snip"])
def test_scores_do_not_depend_on_the_split_into_micro_batches(scorer, norm, batch_norm):
    for dtype, bound in (("float64", 1e-12), ("float32", 1e-5)):
        model = net(dtype, norm=norm)
        whole = score(model, scorer, [(X, Y)], batch_norm=batch_norm)
        for cuts in ([6], [1, 6]):
            parts = zip(np.split(X, cuts), np.split(Y, cuts), strict=True)
            assert error(score(model, scorer, parts, batch_norm=batch_norm), whole) < bound


def test_in_train_mode_the_split_is_part_of_the_method():
    parts = [(X[:6], Y[:6]), (X[6:], Y[6:])]
    assert error(score(net(), "grasp", parts), score(net(), "grasp", [(X, Y)])) > 1e-3


def test_a_shuffled_stream_is_walked_once():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(12, seed=0).batch(4)
    parts = [(x.numpy(), y.numpy()) for x, y in data]
    again = tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(12, seed=0).batch(4)
    assert error(score(net(), "grasp", again), score(net(), "grasp", parts)) < 1e-12


@pytest.mark.sampled(3)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "mixed_bfloat16", "mixed_float16"])
def test_the_model_is_left_bit_identical_whatever_its_precision(scorer, dtype):
    model = net(dtype)
    before, out = state(model), model(X[:3]).numpy()
    scores = score(model, scorer, [(X, Y)])
    again = score(model, scorer, [(X, Y)])
    assert same(scores, again)
    assert all(s.dtype in (np.float32, np.float64) for s in scores.values())
    assert same(before, state(model)) and np.array_equal(out, model(X[:3]).numpy())
    assert all(isinstance(v, tf.Variable) for v in pruning.kernels(model).values())
    logits = model(X, training=True)  # trains as ever, and updates its statistics
    assert logits.shape == (12, 3) and not same(before, state(model))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("scorer", ["grasp", "snip", "synflow"])
def test_a_mixed_precision_model_is_scored_as_the_float32_one(scorer, dtype):
    a, b = score(net(dtype), scorer, [(X, Y)]), score(net("float32"), scorer, [(X, Y)])
    assert error(a, b) < 1e-5


def test_dropout_is_off():
    def build(rate):
        keras.utils.set_random_seed(3)
        return keras.Sequential(
            [keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(9, "relu"),
             layers.Dropout(rate), layers.Dense(3)]
        )  # fmt: skip

    for scorer in ("grasp", "snip"):
        assert same(score(build(0.9), scorer, [(X, Y)]), score(build(0.0), scorer, [(X, Y)]))


def test_a_frozen_normalization_keeps_its_statistics_in_train_mode():
    model = net()
    for name in ("norm1", "norm2"):
        model.get_layer(name).trainable = False
    scores = score(model, "grasp", [(X, Y)], batch_norm="train")
    assert error(scores, score(net(), "grasp", [(X, Y)], batch_norm="eval")) < 1e-12


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}])
def test_normalization_is_kerass_in_train_and_eval_mode(axis, options):
    model = keras.Sequential([keras.Input((5, 4, 3)), layers.BatchNormalization(axis, **options)])
    rng = np.random.default_rng(0)
    for v in model.variables:
        v.assign(rng.uniform(0.5, 2, v.shape))
    x = rng.normal(size=(7, 5, 4, 3)).astype(np.float32)
    for mode in ("eval", "train"):
        ours = Network(model, batch_norm=mode)([], x).numpy()
        before = state(model)
        theirs = model(x, training=mode == "train").numpy()
        assert np.abs(ours - theirs).max() < 1e-5
        pruning.assign(model, before)


# --- Kinds of models ---


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [layers.Conv2D(3, 3, activation="softplus", name=f"c{i}") for i in range(2)]
        self.flat, self.out = layers.Flatten(), layers.Dense(3, name="out")

    def call(self, x):
        for block in self.blocks:
            x = block(x)
        return self.out(self.flat(x))


def nested():
    inner = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3, name="c0"), layers.Activation("softplus")]
    )
    x = keras.Input((6, 6, 2))
    h = layers.Conv2D(3, 3, activation="softplus", name="c1")(inner(x))
    return keras.Model(x, layers.Dense(3, name="out")(layers.Flatten()(h)))


def test_nested_and_subclassed_models_are_scored_alike():
    a, b = nested(), Subclassed()
    b(X[:1])
    values = [v.numpy() for v in pruning.weights(a).values()]
    by_shape = {tuple(np.shape(v)): v for v in values}
    for v in pruning.weights(b).values():
        v.assign(by_shape[tuple(v.shape)])
    for scorer in ("grasp", "snip", "synflow"):
        x = score(a, scorer, [(X, Y)]).values()
        y = score(b, scorer, [(X, Y)]).values()
        pairs = [(p, q) for p in x for q in y if p.shape == q.shape]
        assert len(pairs) == 3
        assert all(np.abs(p - q).max() <= 1e-5 * np.abs(p).max() for p, q in pairs)


def test_a_pruned_model_is_scored_where_its_mask_leaves_weights():
    model = net("float32")
    pruned = pruning.prune(net("float32"))
    mask = SCOPES["global"](score(model, "magnitude"), 0.5)
    pruning.set_mask(pruned, mask)
    pruning.assign(model, state(model), mask)
    for scorer in ("grasp", "snip", "synflow"):
        scores = score(pruned, scorer, [(X, Y)])
        assert error(scores, score(model, scorer, [(X, Y)])) < 1e-6
        assert all((scores[n][m == 0] == 0).all() for n, m in mask.items())
    pruning.check(pruned)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("scorer", ["grasp", "snip", "synflow"])
def test_a_softmax_at_the_end_is_left_out(scorer):
    wanted = score(net(), scorer, [(X, Y)])
    model = net(softmax=True)
    assert error(score(model, scorer, [(X, Y)]), wanted) < 1e-12
    assert np.allclose(model(X).numpy().sum(1), 1)  # and is still there
    for end in (layers.Softmax(), layers.Activation("softmax")):
        inner = net()
        x = keras.Input((6, 6, 2), dtype="float64")
        outer = keras.Model(x, end(inner(x)))
        scores = score(outer, scorer, [(X, Y)]).values()
        pairs = zip(scores, wanted.values(), strict=True)
        assert all(np.abs(p - q).max() <= 1e-6 * np.abs(q).max() for p, q in pairs)


# --- SynFlow ---


def homogeneous():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, use_bias=False, activation="relu", name="c1"),
            layers.MaxPooling2D(),
            layers.Conv2D(5, 3, use_bias=False, activation="relu", name="c2"),
            layers.Flatten(),
            layers.Dense(6, use_bias=False, activation="relu", name="d1"),
            layers.Dense(3, use_bias=False, name="d2"),
        ]
    )
    rng = np.random.default_rng(0)
    for v in model.variables:
        v.assign(rng.normal(size=v.shape))
    return model


def test_synflow_conserves_the_flow_through_every_layer():
    model = homogeneous()
    scores = score(model, "synflow")
    with_absolutes = homogeneous()
    for v in with_absolutes.variables:
        v.assign(np.abs(v.numpy()))
    flow = float(tf.reduce_sum(with_absolutes(np.ones((1, 8, 8, 2), np.float32))))
    for s in scores.values():
        assert s.dtype == np.float64 and (s >= 0).all()
        assert abs(s.sum() / flow - 1) < 1e-5
    assert np.ptp([s.sum() for s in scores.values()]) / flow < 1e-12
    # What flows into a unit flows out of it.
    assert np.allclose(scores["d1/kernel"].sum(0), scores["d2/kernel"].sum(1), rtol=1e-12)


def test_synflow_does_not_overflow_where_float32_would():
    model = keras.Sequential(
        [keras.Input((200,)), *(layers.Dense(200, use_bias=False) for _ in range(30))]
    )
    for v in model.variables:
        v.assign(np.full(v.shape, 10.0))
    scores = score(model, "synflow")
    assert all(np.isfinite(s).all() and s.sum() > 1e38 for s in scores.values())


@pytest.mark.slow
def test_synflow_alone_empties_no_layer_of_vgg16_down_to_one_in_ten_thousand():
    """The pattern of Tanaka et al. 2020, figure 1; at half width, with as many layers."""
    model = MODELS["vgg16"]((32, 32, 3), 100, seed=0, init="kaiming_normal", width=0.5)
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(20, 32, 32, 3)).astype(np.float32), np.arange(20))]
    mask = one_shot_mask(model, "synflow", density=1e-4, rounds=100)
    assert all(m.any() for m in mask.values())
    assert masks.kept(mask) == round(1e-4 * masks.size(mask))
    for scorer, data, alive, cut in (
        ("magnitude", None, 1e-1, 1e-3),
        ("snip", batches, 1e-1, 1e-4),
    ):
        scores = score(model, scorer, data)
        assert all(m.any() for m in SCOPES["global"](scores, alive, min_per_layer=0).values())
        with pytest.raises(UserError, match="nothing would be left"):
            SCOPES["global"](scores, cut)


# --- One-shot masks ---


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_rounds_score_what_the_last_round_left(scorer, schedule):
    model = net("float32")
    before = state(model)
    data = None if scorer in ("synflow", "random", "magnitude") else [(X, Y)]
    mask = one_shot_mask(
        model, scorer, data, density=0.3, rounds=3, schedule=schedule, min_per_layer=1
    )
    initial = {n: v.numpy() for n, v in pruning.kernels(model).items()}
    by_hand = None
    for r in (1, 2, 3):
        d = {"exponential": 0.3 ** (r / 3), "linear": 1 - 0.7 * r / 3}[schedule]
        twin = net("float32")
        pruning.assign(twin, state(twin), by_hand)
        by_hand = SCOPES["global"](
            score(twin, scorer, data), d, within=by_hand, min_per_layer=1
        )
    assert same(mask, by_hand)
    assert masks.kept(mask) == round(0.3 * masks.size(mask))
    assert all(not np.any(np.where(m, 0, 0) != 0) for m in mask.values())
    assert same(before, state(model)) and set(initial) == set(mask)


def test_synflow_takes_100_rounds_unless_told_otherwise():
    model = homogeneous()
    hundred = one_shot_mask(model, "synflow", density=0.05, min_per_layer=0)
    assert same(hundred, one_shot_mask(model, "synflow", density=0.05, rounds=100, min_per_layer=0))
    one = one_shot_mask(model, "synflow", density=0.05, rounds=1, min_per_layer=0)
    assert not same(hundred, one)


def test_a_mask_in_three_lines_from_the_package():
    model = net("float32")
    scores = lth_tf.score(model, "grasp", [(X, Y)])
    mask = lth_tf.SCOPES["global"](scores, density=0.2)
    assert same(mask, lth_tf.one_shot_mask(model, "grasp", [(X, Y)], density=0.2))


def test_a_transform_changes_the_ranking():
    model = net("float32")
    lowest = one_shot_mask(model, "magnitude", density=0.5, transform=np.negative)
    highest = one_shot_mask(model, "magnitude", density=0.5)
    both = sum(np.count_nonzero(lowest[n] & highest[n]) for n in lowest)
    assert both == 2 * masks.kept(lowest) - masks.size(lowest)  # only what the halves share


def test_reused_networks_are_the_same_ones():
    reused = Reused(net())
    assert Network.of(reused, batch_norm="eval") is Network.of(reused, batch_norm="eval")
    assert Network.of(reused, batch_norm="eval") is not Network.of(reused, batch_norm="train")


# --- What cannot be scored ---


def bicubic():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(3, 3),
            layers.UpSampling2D(2, interpolation="bicubic"),
            layers.Flatten(),
            layers.Dense(3),
        ]
    )


class Stopped(keras.Model):
    def __init__(self):
        super().__init__()
        self.flat, self.a, self.b = layers.Flatten(), layers.Dense(4, name="a"), layers.Dense(3)

    def call(self, x):
        return self.b(tf.stop_gradient(self.a(self.flat(x))))


BAD = {
    "labels beyond the outputs": (net, [(X, Y + 1)], "labels range from 1 to 3"),
    "negative labels": (net, [(X, Y - 1)], "labels range from -1"),
    "one-hot labels": (net, [(X, np.eye(3)[Y])], "argmax"),
    "labels of another number": (net, [(X, Y[:5])], r"\[12, 6, 6, 2\] but 5 labels"),
    "no batches": (net, None, "needs batches"),
    "empty batches": (net, [], "batch is empty"),
    "a loss that is not finite": (net, [(X * np.nan, Y)], "the loss of model .* is nan"),
    "no second derivative": (bicubic, [(X, Y)], "no second derivative"),
    "a kernel that the loss does not see": (Stopped, [(X, Y)], "does not depend on a/kernel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_the_model_left_alone(case):
    make, batches, message = BAD[case]
    model = make()
    model(X[:1].astype(np.float32))
    before = state(model)
    with pytest.raises(UserError, match=message):
        score(model, "grasp", batches)
    assert same(before, state(model))
    assert all(isinstance(v, tf.Variable) for v in pruning.kernels(model).values())
    assert model(X[:2].astype(np.float32)).shape == (2, 3)


def test_a_softmax_that_cannot_be_taken_off_is_refused():
    class Probabilities(Subclassed):
        def call(self, x):
            return tf.nn.softmax(super().call(x))

    model = Probabilities()
    model(X[:1])
    with pytest.raises(UserError, match="ends in a softmax"):
        score(model, "snip", [(X, Y)])


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
def test_outputs_that_are_no_logits_are_refused(scorer):
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(3, 3)])
    with pytest.raises(UserError, match="logits of shape"):
        score(model, scorer, [(X, Y)])


def test_a_vanishing_second_derivative_is_refused():
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(3)])
    with pytest.raises(UserError, match="zero everywhere"):
        score(model, "grasp", [(X, Y)], loss=lambda y, z: tf.reduce_sum(z, -1))


def test_a_vanishing_gradient_is_refused():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(4, "relu"), layers.Dense(3)]
    )
    for v in model.variables:
        v.assign(tf.zeros_like(v))
    with pytest.raises(UserError, match="gradient is zero everywhere"):
        score(model, "snip", [(X, Y)])


def test_models_that_are_none_or_have_no_kernels_are_refused():
    with pytest.raises(UserError, match="has nothing to prune"):
        score(keras.Sequential([keras.Input((3,)), layers.Activation("relu")]), "synflow")
    with pytest.raises(UserError, match="takes a tf_keras model"):
        score("resnet", "grasp")
    with pytest.raises(UserError, match="not built"):
        score(keras.Sequential([layers.Dense(3)]), "magnitude")


def test_unknown_scorers_and_options_name_what_there_is():
    with pytest.raises(UserError, match="unknown scorer 'grapes'.*Did you mean 'grasp'"):
        score(net(), "grapes")
    with pytest.raises(UserError, match="'snip' has no option 'temperature'; it has: variant"):
        score(net(), "snip", [(X, Y)], temperature=2.0)
    with pytest.raises(UserError, match="variant 'papers' of grasp; there are: paper, official"):
        score(net(), "grasp", [(X, Y)], variant="papers")
    with pytest.raises(UserError, match="unknown variant 'absolute' of snip"):
        score(net(), "snip", [(X, Y)], variant="absolute")
    with pytest.raises(UserError, match="temperature 0"):
        score(net(), "grasp", [(X, Y)], temperature=0)
    with pytest.raises(UserError, match="unknown batch_norm 'training'"):
        score(net(), "grasp", [(X, Y)], batch_norm="training")


def test_synflow_says_when_no_one_knows_the_shape_of_inputs(monkeypatch):
    model = Subclassed()
    model(X[:1])
    monkeypatch.setattr(model, "save_spec", lambda: None)
    with pytest.raises(UserError, match="does not know the shape"):
        score(model, "synflow")
    assert score(model, "synflow", [(X, Y)])


def test_batch_normalizations_of_ones_own_are_refused():
    class Mine(layers.BatchNormalization):
        pass

    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Mine()])
    with pytest.raises(UserError, match="is a Mine, a batch normalisation that lth_tf does not"):
        score(model, "snip", [(np.ones((2, 4)), np.array([0, 1]))])


# --- Magnitude and random ---


def magnitude(values):
    return SCORERS["magnitude"](None, {"fc1/kernel": values}, None)["fc1/kernel"]


@pytest.mark.parametrize("kind", ["array", "variable"])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (tf.float16, np.float32),
        (tf.bfloat16, np.float32),
        (tf.float32, np.float32),
        (tf.float64, np.float64),
    ],
)
def test_magnitude_is_the_absolute_value_in_float32_or_wider(dtype, wide, kind):
    w = tf.constant([[-2.0, 0.5, 1 / 3], [0.0, -0.0, -1e-4]], dtype)
    scores = magnitude(tf.Variable(w) if kind == "variable" else w.numpy())
    assert scores.dtype == wide and scores.shape == (2, 3)
    assert (scores == np.abs(tf.cast(w, tf.float64).numpy())).all()
    assert not np.signbit(scores).any()


def test_magnitude_keeps_what_float64_tells_apart():
    assert len(np.unique(magnitude(1 + np.arange(5) * 2.0**-50))) == 5


def test_magnitude_is_higher_for_what_is_kept():
    scores = magnitude(np.array([0.1, -3.0, 0.0, 2.0], np.float32))
    assert np.argsort(-scores).tolist() == [1, 3, 0, 2]


def test_magnitude_takes_all_kernels_and_leaves_them_alone():
    kernels = {"b": tf.Variable([[-1.0]]), "a": np.array([-2.0, 3.0])}
    scores = SCORERS["magnitude"](None, kernels)
    assert list(scores) == ["b", "a"] and scores["a"].tolist() == [2, 3]
    assert kernels["b"].numpy() == -1 and kernels["a"].tolist() == [-2, 3]
    scores["a"][:] = 0
    assert kernels["a"].tolist() == [-2, 3]


def test_random_scores_are_uniform_and_follow_the_seed():
    kernels = {"a": np.zeros((100, 100)), "b": np.zeros(500)}
    one, two = (SCORERS["random"](None, kernels, seed=s) for s in (0, 1))
    assert same(one, SCORERS["random"](None, kernels)) and not same(one, two)
    flat = np.concatenate([s.ravel() for s in one.values()])
    assert 0 <= flat.min() and flat.max() < 1 and abs(flat.mean() - 0.5) < 0.01


# --- What people's models have ---


class Helped(keras.Model):
    """Its call goes through a tf.function, which keeps what it was traced with."""

    def __init__(self):
        super().__init__()
        self.flat, self.a, self.b = layers.Flatten(), layers.Dense(4, "tanh"), layers.Dense(3)

    @tf.function
    def features(self, x):
        return self.a(self.flat(x))

    def call(self, x):
        return self.b(self.features(x))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("traced_before", [True, False])
def test_a_tf_function_inside_a_model_is_seen_through_and_left_alone(traced_before):
    model, plain = Helped(), Helped()
    for m in (model, plain):
        m(X[:2])
    plain.features = plain.features.python_function
    pruning.assign(plain, state(model))
    if traced_before:
        model(X)
    for scorer in ("grasp", "snip", "synflow"):
        assert error(score(model, scorer, [(X, Y)]), score(plain, scorer, [(X, Y)])) < 1e-6
    assert np.allclose(model(X), plain(X), atol=1e-6) and model(X[:2]).shape == (2, 3)
    assert not tf.config.functions_run_eagerly()


def test_normalization_that_a_functional_model_calls_with_training_false_stays_so():
    base = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(3, 3), layers.BatchNormalization()]
    )
    x = keras.Input((6, 6, 2))
    h = layers.Activation("softplus")(base(x, training=False))
    model = keras.Model(x, layers.Dense(3)(layers.Flatten()(h)))
    assert same(
        score(model, "grasp", [(X, Y)], batch_norm="train"),
        score(model, "grasp", [(X, Y)], batch_norm="eval"),
    )


def test_layer_normalization_is_kerass_and_its_second_derivative_right():
    """Against a network in float64 in which it is written by hand."""
    model = keras.Sequential(
        [keras.Input((72,)), layers.Dense(5, "tanh"), layers.LayerNormalization(), layers.Dense(3)]
    )
    rng = np.random.default_rng(0)
    for v in model.variables:
        v.assign(rng.normal(size=v.shape))
    flat = X.reshape(12, 72).astype(np.float32)
    ours = Network(model)([v.numpy() for v in pruning.kernels(model).values()], flat)
    assert np.abs(ours - model(flat)).max() < 1e-5
    w1, b1, gamma, beta, w2, b2 = (tf.constant(v.numpy(), tf.float64) for v in model.weights)
    with tf.GradientTape() as outer:
        outer.watch([w1, w2])
        with tf.GradientTape() as inner:
            inner.watch([w1, w2])
            h = tf.tanh(tf.constant(flat, tf.float64) @ w1 + b1)
            centred = h - tf.reduce_mean(h, -1, keepdims=True)
            h = centred / tf.sqrt(tf.reduce_mean(centred**2, -1, keepdims=True) + 1e-3)
            losses = LOSSES["cross_entropy"](Y, ((h * gamma + beta) @ w2 + b2) / 200)
            loss = tf.reduce_mean(losses)
        gradients = inner.gradient(loss, [w1, w2])
        along = tf.add_n([tf.reduce_sum(g * tf.stop_gradient(g)) for g in gradients])
    products = outer.gradient(along, [w1, w2])
    names = pruning.kernels(model)
    wanted = {
        n: (w * h).numpy() for n, w, h in zip(names, (w1, w2), products, strict=True)
    }
    assert error(score(model, "grasp", [(flat, Y)]), wanted) < 1e-4


def test_synflow_in_float64_with_what_was_built_in_float32():
    """Scaled images, a sum with the input, normalisations: Keras fixes the dtype of each."""
    x = keras.Input((6, 6, 2))
    scaling = layers.Normalization()
    scaling.adapt(X)
    h = layers.Flatten()(layers.Rescaling(2.0, offset=-1.0)(scaling(x)))
    h = layers.LayerNormalization()(h + layers.Dense(72, "relu")(h))
    model = keras.Model(x, layers.Dense(3)(h))
    scores = score(model, "synflow")
    assert all(s.dtype == np.float64 and s.any() for s in scores.values())


def test_what_was_lost_or_kept_by_activity_regularizers_is_as_before():
    model = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Flatten(), layers.Dense(3, activity_regularizer="l2")]
    )
    model(X)
    before = [float(x) for x in model.losses]
    score(model, "snip", [(X, Y)])
    assert [float(x) for x in model.losses] == before and before[0] > 0


@pytest.mark.slow
def test_fit_goes_on_as_if_nothing_had_been_scored():
    histories = []
    for scored in (False, True):
        model = net("float32")
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        first = model.fit(X, Y, verbose=0, shuffle=False).history["loss"]
        for scorer in SCORERS if scored else ():
            score(model, scorer, [(X, Y)])
        histories.append(first + model.fit(X, Y, verbose=0, shuffle=False).history["loss"])
    assert histories[0] == histories[1]


def test_a_fixed_batch_size_is_kept_to():
    model = keras.Sequential(
        [keras.Input(batch_shape=(12, 6, 12)), layers.SimpleRNN(5), layers.Dense(3)]
    )
    for scorer in SCORERS:
        assert score(model, scorer, [(X.reshape(12, 6, 12), Y)])


def two_outputs():
    x = keras.Input((6, 6, 2))
    h = layers.Flatten()(x)
    return keras.Model(x, [layers.Dense(3)(h), layers.Dense(3)(h)])


def softmax_twice():
    x = keras.Input((6, 6, 2))
    softmax = layers.Activation("softmax")
    h = softmax(layers.Dense(3)(layers.Flatten()(x)))
    return keras.Model(x, softmax(layers.Dense(3)(h)))


class Counting(layers.Layer):
    def build(self, shape):
        self.n = self.add_weight("n", [], trainable=False, initializer="zeros")
        self.w = [self.add_weight("w", [2])]

    def call(self, x):
        self.n.assign_add(1)
        return x * self.w[0]


def counting():
    return keras.Sequential(
        [keras.Input((6, 6, 2)), Counting(), layers.Flatten(), layers.Dense(3)]
    )


def stateful():
    return keras.Sequential(
        [keras.Input(batch_shape=(12, 6, 12)), layers.SimpleRNN(5, stateful=True), layers.Dense(3)]
    )


@pytest.mark.parametrize(
    ("make", "scorer", "batches", "message"),
    [
        (two_outputs, "snip", [(X, Y)], "puts out 2 tensors"),
        (softmax_twice, "snip", [(X, Y)], "ends in a softmax"),
        (softmax_twice, "synflow", None, "nothing flows .* end in a softmax"),
        (counting, "snip", [(X, Y)], "cannot be computed .*assign_add"),
        (counting, "synflow", None, "'counting/w' is held in a list or dict"),
        (stateful, "snip", [(X.reshape(12, 6, 12), Y)], "is stateful"),
        (net, "snip", (X, Y), r"give \[\(inputs, labels\)\]"),
        (net, "snip", tf.data.Dataset.from_tensor_slices((X, Y)), "not batched"),
        (net, "snip", [(X[:, :5], Y)], "cannot be computed on these inputs in float64"),
    ],
)
def test_what_cannot_be_scored_is_said_in_one_sentence(make, scorer, batches, message):
    with pytest.raises(UserError, match=message):
        score(make(), scorer, batches)


def test_a_loss_goes_by_its_name_and_a_pruned_model_is_not_pruned_from_the_start():
    by_name = score(net(), "grasp", [(X, Y)], loss="squared_error")
    assert same(by_name, score(net(), "grasp", [(X, Y)], loss=LOSSES["squared_error"]))
    with pytest.raises(UserError, match="unknown loss 'squared'.*Did you mean 'squared_error'"):
        score(net(), "grasp", [(X, Y)], loss="squared")
    with pytest.raises(UserError, match="is pruned already"):
        one_shot_mask(pruning.prune(net("float32")), "magnitude", density=0.5)
    with pytest.raises(UserError, match="rounds 2.5"):
        one_shot_mask(net(), "magnitude", density=0.5, rounds=2.5)


@pytest.mark.parametrize("scorer", ["grasp", "snip"])
def test_scores_are_computed_with_all_digits_of_float32(scorer):
    """On GPUs TensorFlow would multiply in TF32 unless told not to; it is told so again after."""
    enabled, seen = tf.config.experimental.tensor_float_32_execution_enabled, []

    def loss(labels, logits):
        seen.append(enabled())
        return LOSSES["cross_entropy"](labels, logits)

    before = enabled()
    score(net(), scorer, [(X, Y)], loss=loss)
    assert seen and not any(seen) and enabled() == before


# --- Saturation, and equal scores ---


def saturating(kind, cap=6.0):
    """Positive flows of 40 and more, where ReLU6 is flat; the same net with ReLU to compare."""
    hidden = {
        "layer": lambda: layers.ReLU(cap),
        "activation": lambda: layers.Activation("relu6"),
        "function": lambda: layers.Activation(tf.nn.relu6),
        "lambda": lambda: layers.Lambda(tf.nn.relu6),
        "operation": lambda: tf.nn.relu6,
        "tanh": lambda: layers.Activation("tanh"),
        "relu": lambda: layers.ReLU(),
        "linear": lambda: layers.Activation("linear"),
    }[kind]
    x = y = keras.Input((8, 8, 2))
    for i, n in enumerate((30, 30)):
        y = hidden()(layers.Conv2D(n, 3, use_bias=False, name=f"conv{i}")(y))
    y = hidden()(layers.Dense(20, name="fc")(layers.Flatten()(y)))
    model = keras.Model(x, layers.Dense(4, name="output")(y))
    rng = np.random.default_rng(0)
    for v in pruning.kernels(model).values():
        v.assign(rng.normal(size=v.shape))
    return model


@pytest.mark.parametrize("kind", ["layer", "activation", "function", "lambda", "operation"])
def test_synflow_of_relu6_is_that_of_relu(kind):
    assert same(score(saturating(kind), "synflow"), score(saturating("relu"), "synflow"))


def test_synflow_of_tanh_is_that_of_a_linear_network_and_other_scores_are_as_they_were():
    found, wanted = (score(saturating(kind), "synflow") for kind in ("tanh", "linear"))
    assert all(np.allclose(found[n], wanted[n], rtol=1e-12) for n in wanted)
    model, x = saturating("layer"), RNG.normal(size=(12, 8, 8, 2)).astype(np.float32)
    before = model.predict(x, verbose=0)
    flat, round_ = (score(saturating(k), "snip", [(x, Y)]) for k in ("layer", "relu"))
    assert not same(flat, round_)  # ReLU6 as it is
    score(model, "synflow")
    assert np.array_equal(model.predict(x, verbose=0), before)


class RawReLU6(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(50), layers.Dense(3)

    def call(self, x):
        return self.b(tf.nn.relu6(self.a(x)))


def gated(x):
    """Hard swish and a gate of its own, as MobileNetV3 has them; biases, so that gates are open."""
    y = layers.Dense(20)(x)
    return y * (layers.ReLU(6.0)(y + 3.0) / 6)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: built(RawReLU6()), "ReLU6 .* make it a"),
        (lambda: ends(layers.Dense(9, "sigmoid")), "'sigmoid', which saturates and is not zero"),
        (lambda: ends(layers.Dense(9, "hard_sigmoid")), "'hard_sigmoid', which saturates"),
        (lambda: ends(gated), "multiplies activations that saturate"),
        (lambda: ends(layers.Lambda(lambda x: tf.minimum(layers_sum(x), 1.0))), "nothing flows"),
    ],
)
def test_synflow_refuses_what_saturates_and_cannot_be_continued(model, message):
    with pytest.raises(UserError, match=message):
        score(model(), "synflow")


def layers_sum(x):
    return tf.reduce_sum(x, -1, keepdims=True)


def built(model):
    model(np.ones((1, 6), np.float32))
    return model


def ends(middle):
    x = keras.Input((6,))
    y = middle(layers.Dense(40, kernel_initializer="ones")(x))
    return keras.Model(x, layers.Dense(3)(y))


def test_attention_beside_activations_that_only_bend_is_scored_by_synflow():
    x = keras.Input((5, 6))
    y = layers.Dense(6, "swish")(x)
    y = layers.Flatten()(layers.MultiHeadAttention(2, 3)(y, y))
    scores = score(keras.Model(x, layers.Dense(3)(y)), "synflow")
    least = max(s.sum() for s in scores.values()) * 1e-12
    assert sorted(n.split("/")[-2] for n, s in scores.items() if s.sum() < least) == [
        "key", "query"
    ]  # fmt: skip


def test_a_cut_among_equal_scores_is_said(recwarn):
    model = ends(layers.Activation("linear"))  # its first kernel: 240 ones
    with pytest.warns(TiedScores) as said:
        one_shot_mask(model, "magnitude", density=0.5, min_per_layer=0)
    text = str(said[0].message)
    assert "falls among 240 equal scores: 180 of them are kept and 60 pruned" in text
    assert "in dense" in text and "kernel (240)" in text and "kernel (120)" not in text
    assert "round" not in text


def test_few_equal_scores_or_none_are_not_worth_a_word(recwarn):
    one_shot_mask(net("float32"), "magnitude", density=0.5)
    one_shot_mask(net("float32"), "snip", [(X, Y)], density=0.3, rounds=3)
    assert not [w for w in recwarn if w.category is TiedScores]


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_equal_scores_are_counted_where_they_compete(scope):
    scores = {"a": np.zeros(40), "b": np.array([0.0] * 30 + [1.0] * 10)}
    mask = SCOPES[scope](scores, 0.5, min_per_layer=0)
    found = masks.tied(scores, mask, pooled=scope == "global")
    wanted = {"a": (30, 10), "b": (0, 30)} if scope == "global" else {"a": (20, 20), "b": (10, 20)}
    assert found == wanted
    within = {"a": np.array([1] * 20 + [0] * 20), "b": np.ones(40, np.uint8)}
    mask = SCOPES["global"](scores, 0.25, within, min_per_layer=0)
    assert masks.tied(scores, mask, within, pooled=True) == {"a": (10, 10), "b": (0, 30)}
    apart = {"a": np.arange(40.0), "b": -1 - np.arange(40.0)}
    mask = SCOPES[scope](apart, 0.5, min_per_layer=0)
    assert masks.tied(apart, mask, pooled=scope == "global") == {}


# --- Labels, heads and inputs ---


@pytest.mark.parametrize("scorer, options", [("snip", {}), ("grasp", {"variant": "official"})])
def test_labels_in_a_column_are_labels(scorer, options):
    wanted = score(net(), scorer, [(X, Y)], **options)
    assert same(score(net(), scorer, [(X, Y[:, None].astype(np.uint8))], **options), wanted)


@pytest.mark.parametrize(
    "labels, advice",
    [
        (np.eye(3)[Y], r"argmax\(axis=1\)$"),
        (np.eye(3, dtype=np.int64)[Y], r"argmax\(axis=1\)$"),
        (Y.astype(np.float32), "astype"),
        (Y[:, None].astype(np.float32), "astype"),
        (Y == 1, "astype"),
        (Y + 0.5, "regression"),
        (np.full((12, 3), 1 / 3), "of probabilities that is argmax"),
        (np.ones((12, 3), np.int32), "several labels an example"),
        (np.ones((12, 4, 4), np.int32), "not one for each of its pixels"),
        (Y.astype(str), "numpy.unique"),
    ],
)
def test_labels_of_other_shapes_and_kinds_are_refused_with_what_helps(labels, advice):
    with pytest.raises(UserError, match=advice) as refused:
        score(net(), "snip", [(X, labels)])
    if "argmax(axis=1)$" in advice:
        assert score(net(), "snip", [(X, labels.argmax(axis=1))])
    if "astype" in advice:
        assert "astype('int32')" in str(refused.value)
        assert score(net(), "snip", [(X, labels.astype("int32"))])


class SigmoidHead(keras.Model):
    def __init__(self):
        super().__init__()
        self.a, self.b = layers.Dense(50), layers.Dense(3, "sigmoid")

    def call(self, x):
        return tf.reshape(self.b(self.a(x)), (-1, 3))


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
@pytest.mark.parametrize("units", [1, 3])
def test_a_sigmoid_head_puts_out_no_logits(scorer, units):
    x = keras.Input((6,))
    inside = keras.Model(x, layers.Dense(units, "sigmoid")(layers.Dense(8, "relu")(x)))
    operation = keras.Model(x, tf.sigmoid(layers.Dense(units)(x)))
    batch = np.ones((12, 6), np.float32), Y
    for model in (inside, operation, *([built(SigmoidHead())] if units == 3 else [])):
        with pytest.raises(UserError, match="ends in a sigmoid, .* linear output for each class"):
            score(model, scorer, [batch])
    assert sum(s.any() for s in score(inside, "synflow").values()) == 2


@pytest.mark.parametrize("scorer", ["snip", "grasp"])
def test_images_that_are_not_numbers_are_refused_where_the_loss_hides_them(scorer):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Lambda(lambda x: x), layers.Dense(4), layers.Dense(3)]
    )
    hidden = keras.Sequential(
        [keras.Input((6,)), layers.Dense(4), layers.Lambda(quiet), layers.Dense(3)]
    )
    x = np.ones((12, 6), np.float32)
    x[3, 2] = np.nan
    for one, message in ((model, "the loss of"), (hidden, "NaN among the inputs")):
        with pytest.raises(UserError, match=message):
            score(one, scorer, [(x, Y)])


def quiet(x):
    return tf.math.softplus(tf.where(tf.math.is_finite(x), x, tf.zeros_like(x)))
