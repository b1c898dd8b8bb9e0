"""Training what is alive: the part of a network that takes part, with the whole one's results."""

import dataclasses
import json
import os
import warnings

import numpy as np
import pytest

from lth_tf import compaction, datasets, experiments, masks, pruning, storage
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.models import MODELS
from lth_tf.models.parts import StatelessDropout, initialisers, norm
from lth_tf.pruning.slots import slots_for
from lth_tf.spec import Spec
from lth_tf.training import Interrupted, Trainer, compact, optimizers

DIGITS = datasets.load("digits")
SPEC = Spec(
    model="lenet_12_9", dataset="digits", validation_size=100, batch_size=20, train_steps=40,
    eval_every=10, learning_rate=0.01, precision="float64", distribute="none", checkpoint_every=0,
    compile="off", adam_epsilon=1e-3,  # else 1e-17 in a gradient that is zero is 1e-10 in a weight
)  # fmt: skip
layers = keras.layers
RUNS = max(1, int(os.environ.get("LTH_TF_SLOW_TESTS", "0")))  # of each property


def _mixed(input_shape, classes, seed, *, init="glorot_normal"):
    """Whatever a part can be cut out of: two blocks, one of them residual, every kind of layer."""
    inits = initialisers(init, seed)
    x = inputs = keras.Input(input_shape)
    for name, size in (("a", 8), ("b", 7)):
        x = layers.Conv2D(
            size, 3, padding="same", use_bias=name == "b", kernel_initializer=next(inits), name=name
        )(x)
        x = layers.ReLU(name=f"{name}_relu")(norm(f"{name}_norm")(x))
    y = layers.ZeroPadding2D(1, name="pad")(x)
    y = layers.Conv2D(7, 3, kernel_initializer=next(inits), activation="tanh", name="c")(y)
    x = layers.Activation("relu", name="sum_relu")(layers.Add(name="sum")([x, y]))
    x = layers.AveragePooling2D(2, padding="same", name="mean")(x)
    x = layers.MaxPooling2D(2, name="max")(StatelessDropout(0.3, 5, name="drop")(x))
    x = layers.Flatten(name="flatten")(x)
    x = layers.Dense(15, "relu", kernel_initializer=next(inits), name="d")(x)
    x = StatelessDropout(0.5, 6, name="drop_d")(x)
    x = layers.Dense(9, use_bias=False, kernel_initializer=next(inits), name="e")(x)
    x = layers.ReLU(name="e_relu")(layers.BatchNormalization(center=False, name="e_norm")(x))
    x = layers.Dense(classes, kernel_initializer=next(inits), name="output")(x)
    return keras.Model(inputs, x, name="mixed")


@pytest.fixture(autouse=True)
def mixed(monkeypatch):
    monkeypatch.setitem(MODELS._entries, "mixed", _mixed)


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


def trainer(s, compact_training):
    return Trainer(s, DIGITS, execution=Execution("tensorflow", compact_training))


def start(model, seed=0, density=0.15):
    """Weights and a mask at random; a third of all channels without inputs, without outputs, or
    with a bias below zero.
    """
    rng = np.random.default_rng(seed)
    weights = {n: v.numpy() for n, v in pruning.weights(model).items()}
    mask = {}
    for name, v in pruning.kernels(model).items():
        shape = tuple(v.shape)
        m = rng.random(shape) < (density if "output" not in name else 0.5)
        m[..., rng.random(shape[-1]) < 0.3] &= "output" in name
        m[..., rng.random(shape[-2]) < 0.2, :] &= shape[-2] < 4
        mask[name] = m.astype(np.uint8)
    for name, value in weights.items():
        if name.endswith(("bias", "beta")) and "output" not in name:
            weights[name] = np.where(rng.random(value.shape) < 0.4, -rng.random(value.shape), value)
            weights[name] += np.where(rng.random(value.shape) < 0.1, 0.1, 0)
        if name == "b_norm/beta":  # of a constant: 0 but for how its mean is rounded, then the ReLU
            weights[name] += 0.01
    return masks.apply(mask, weights), mask


def far(one, other):
    """The largest difference of weights; of moving statistics, only of those in use."""
    names = [n for n in one if "moving" not in n and "count" not in n]
    assert all(one[n] == other[n] for n in one if "count" in n)
    return max(np.abs(one[n] - other[n]).max() for n in names)


KINDS = [
    ("mixed", {}),
    ("mixed", {"optimizer": "adamw", "weight_decay": 0.1, "augmentation": "flip_crop"}),
    ("mixed", {"optimizer": "nesterov", "weight_decay": 0.01}),
    ("lenet_12_9", {"weight_decay": 0.01, "lr_schedule": "cosine", "warmup_steps": 7}),
    ("lenet_12_9", {"weight_decay": 0.01, "optimizer": "sgd", "compile": "on"}),
    ("lenet_12_9", {"optimizer": "momentum"}),
]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", range(RUNS))
@pytest.mark.parametrize("model, kind", KINDS)
def test_a_part_is_trained_as_in_the_whole_network(model, kind, seed):
    s = spec(model=model, train_steps=20, **kind)
    whole, part = trainer(s, "off"), trainer(s, "on")
    weights, mask = start(whole.model, 10 * seed + KINDS.index((model, kind)))
    one, other = (each.train(weights, mask, 0, 20, seed=3) for each in (whole, part))
    assert one.decision == Decision() and other.decision == Decision(compact=True)
    left = part.engine._part
    assert any(not keep.all() for keep in left.keep.values())
    assert far(one.weights, other.weights) < 1e-10
    slots = [[v.numpy() for v in t.optimizer.variables] for t in (whole, part)]
    assert max(np.abs(a - b).max() for a, b in zip(*slots, strict=True)) < 1e-10
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-10)
        assert (a["test_accuracy"] is None) == (b["test_accuracy"] is None)


@pytest.mark.parametrize("seed", range(10 * RUNS))
def test_what_is_left_out_changes_no_output_and_has_no_gradient(seed):
    model = _mixed((8, 8, 1), 10, seed)
    pruned = pruning.prune(model)
    weights, mask = start(pruned, seed)
    pruning.set_mask(pruned, mask)
    pruning.assign(pruned, weights, mask)
    net = compaction.Net(pruned)
    still = {n: w <= 0 for n, w in weights.items() if w.ndim == 1}
    still |= {n: w == 0 for n, w in weights.items() if "moving" in n}
    part = net.alive(mask, still)
    places = net.places(part)
    small = net.small(part)
    for name, v in pruning.weights(small).items():
        v.assign(weights[name][np.ix_(*places[name])])
    x = np.random.default_rng(seed).normal(size=(6, 8, 8, 1)).astype("float32")
    assert np.allclose(pruned(x), small(x), atol=1e-6)  # statistics in use
    trained = [(n, v) for n, v in pruning.weights(pruned).items() if v.trainable]
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(pruned(x, training=True) ** 2)
    gradients = tape.gradient(loss, [v for _, v in trained])
    for (name, v), g in zip(trained, gradients, strict=True):
        out = compaction.left_out(tuple(v.shape), places[name])
        assert not np.any(tf.convert_to_tensor(g).numpy()[out]), name
    whole, less = net.work(), net.work(part)
    assert all(less[k] <= whole[k] for k in whole) and less["weights"] < whole["weights"]


def unit(bias, activation="relu", weights=0.0, **more):
    """Which of three hidden units take part: the middle one has no inputs, and that bias."""
    x = keras.Input([4])
    y = layers.Dense(3, activation, name="hidden")(x)
    model = pruning.prune(keras.Model(x, layers.Dense(2, name="output")(y)))
    mask = {n: np.ones(v.shape, np.uint8) for n, v in pruning.kernels(model).items()}
    mask["hidden/kernel"][:, 1] = 0
    values = {n: v.numpy() for n, v in pruning.weights(model).items()}
    values["hidden/bias"][1] = bias
    s = spec(precision="float32", **more)
    model.compile(optimizers.OPTIMIZERS[s.optimizer](0.1, s))
    pruning.create_slots(model.optimizer, model)
    pruning.set_mask(model, mask)
    pruning.assign(model, values, mask)
    strategy = tf.distribute.get_strategy()
    feed = Trainer(spec(), DIGITS).feed
    setup = compact.Setup(s, None, model, model.optimizer, feed, strategy, None)
    engine = compact.Compact(setup, compact.start_of(model))
    return engine, model, mask


@pytest.mark.parametrize(
    "bias, more, left",
    [
        (0.0, {}, True),
        (-0.5, {}, True),
        (0.5, {}, False),  # it is trained
        (0.0, {"weight_decay": 0.1}, True),
        (-0.5, {"weight_decay": 0.1}, False),  # under Adam it may become positive
        (0.0, {"activation": "tanh"}, False),
        (0.0, {"activation": "sigmoid"}, False),
    ],
)
def test_a_unit_without_inputs_is_left_out_where_it_stays_zero(bias, more, left):
    engine, *_, mask = unit(bias, **more)
    assert engine.part(mask).keep["hidden"].tolist() == [True, not left, True]


def test_a_bias_that_moved_or_will_is_not_judged():
    engine, model, mask = unit(-0.5)
    bias = pruning.weights(model)["hidden/bias"]
    moved = bias.numpy()
    moved[1] = -0.25
    bias.assign(moved)  # below zero as before, but not where it began
    assert engine.part(mask).keep["hidden"].all()
    engine, model, mask = unit(0.0)
    momentum, _ = slots_for(model.optimizer, pruning.weights(model)["hidden/bias"])
    momentum.assign([0.0, 0.1, 0.0])  # which will move it
    assert engine.part(mask).keep["hidden"].all()


@pytest.mark.slow
def test_a_layer_keeps_a_channel_and_an_empty_network_its_biases():
    s = spec(model="mixed")
    one = trainer(s, "on")
    weights, mask = start(one.model)
    empty = {n: np.zeros_like(m) for n, m in mask.items()}
    found = one.train(masks.apply(empty, weights), empty, 0, 10)
    assert all(k.any() for k in one.engine._part.keep.values())
    other = trainer(s, "off").train(masks.apply(empty, weights), empty, 0, 10)
    assert far(found.weights, other.weights) < 1e-10
    assert np.any(found.weights["output/bias"] != weights["output/bias"])


def test_the_first_layer_takes_inputs_in_use_alone():
    one = trainer(spec(), "on")
    weights, mask = start(one.model)
    one.train(weights, mask, 0, 10)
    assert "fc1" in one.engine._part.takes
    taken = compaction.Take([2, 0], name="taken")
    again = compaction.Take.from_config(taken.get_config())
    assert again(tf.constant([[1.0, 2.0, 3.0]])).numpy().tolist() == [[3.0, 1.0]]


def test_dropout_is_drawn_at_full_width():
    whole = StatelessDropout(0.5, 3, name="drop")
    x = tf.ones([4, 5, 6])
    keep = np.array([1, 0, 1, 1, 0, 1], bool)
    part = StatelessDropout.from_config(whole.narrowed(keep))
    all_of_it = whole(x, training=True).numpy()
    assert np.array_equal(all_of_it[..., keep], part(x[..., :4], training=True))
    assert "width" not in whole.get_config() and part.get_config()["width"] == 6


# --- In a training ---


def test_callbacks_see_the_whole_network_and_masks_move():
    class Mover(keras.callbacks.Callback):
        """Looks at weights, changes one, and moves the mask: what was left out has momentum."""

        def on_epoch_end(self, epoch, logs=None):
            mask = pruning.get_mask(self.model)
            kernel = pruning.kernels(self.model)["a/kernel"]
            kernel.assign(kernel.numpy() * 1.01)
            if logs["step"] in (10, 20):
                moved = {n: m if "output" in n else np.roll(m, 1, -1) for n, m in mask.items()}
                pruning.set_mask(self.model, moved)

    s = spec(model="mixed", optimizer="momentum")
    found = {}
    for how in ("off", "on"):
        one = trainer(s, how)
        found[how] = one.train(*start(one.model), 0, 40, callbacks=[Mover()])
    assert all((found["on"].mask[n] == m).all() for n, m in found["off"].mask.items())
    assert far(found["off"].weights, found["on"].weights) < 1e-10


@pytest.mark.sampled(1)
@pytest.mark.parametrize("kind", [{}, {"optimizer": "nesterov", "weight_decay": 0.01}])
def test_a_training_is_resumed_bit_for_bit(kind):
    s = spec(model="mixed", **kind)
    one = trainer(s, "on")
    begin = start(one.model)
    captured = []
    whole = one.train(*begin, 0, 40, capture=25, captured=captured.append)
    kept, again = [], iter([False, True] + [True] * 99)
    with pytest.raises(Interrupted):
        trainer(s, "on").train(*begin, 0, 40, keep=kept.append, asked=lambda: next(again))
    assert kept[0].decision["compact"] and 0 < kept[0].step < 40
    resumed = trainer(s, "off").train(*begin, 0, 40, state=kept[0])  # the state says how
    assert captured and resumed.decision == Decision(compact=True)
    for name, w in whole.weights.items():
        assert w.tobytes() == resumed.weights[name].tobytes()


def test_where_it_does_not_pay_nothing_changes():
    found = []
    for how in ("off", "auto"):
        one = trainer(spec(precision="float32"), how)
        found.append(one.train(*start(one.model), 0, 40))
    assert found[0].decision == found[1].decision == Decision()
    for name, w in found[0].weights.items():
        assert w.tobytes() == found[1].weights[name].tobytes()


def test_it_is_taken_where_it_pays():
    one = trainer(spec(model="lenet_1000_1000"), "auto")
    weights, mask = start(one.model)
    one.engines.look()
    ones = {n: np.ones_like(m) for n, m in mask.items()}
    chosen = [one.engines.choose(m, n).compact for m in (mask, ones) for n in (10, 10**6)]
    assert chosen == [False, True, False, False]
    off = trainer(spec(model="lenet_1000_1000"), "off")
    assert not off.engines.choose(mask, 10**6).compact


class _Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(10)

    def call(self, x):
        return self.dense(tf.reshape(x, [-1, 64]))


def _twice(input_shape, classes, seed, **options):
    x = keras.Input(input_shape)
    same = layers.Dense(64, name="same")
    return keras.Model(x, layers.Dense(classes)(same(same(layers.Flatten()(x)))), name="twice")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"distribute": "mirrored", "devices": 2}, "replicas"),
        ({"precision": "mixed_float16"}, "the loss is scaled"),
        ({"model": "twice"}, "layer 'same' is called more than once"),
    ],
)
def test_where_it_does_not_work_the_reason_is_told(changes, why, monkeypatch):
    monkeypatch.setitem(MODELS._entries, "twice", _twice)
    s = spec(**changes)
    with pytest.raises(UserError, match=f"compact_training=on does not work here: .*{why}"):
        trainer(s, "on")
    auto = trainer(s, "auto")
    assert why in auto.engines.told()
    assert not auto.engines.choose(start(auto.model)[1], 10**9).compact


def test_optimizers_that_couple_entries_turn_it_off():
    one = trainer(spec(), "off")
    for made, why in (
        (keras.optimizers.SGD(0.1, global_clipnorm=1.0), "global_clipnorm"),
        (keras.optimizers.Adam(0.1, clipnorm=1.0), "clipnorm"),
        (keras.optimizers.Adam(0.1, use_ema=True), "use_ema"),
        (keras.optimizers.Adafactor(0.1), "Adafactor"),
    ):
        assert why in compact.unfit(dataclasses.replace(one.setup, optimizer=made))
    assert compact.unfit(one.setup) is None


# --- In an experiment ---


def test_tickets_of_six_levels_are_the_same(tmp_path):
    s = spec(levels=6, prune_fraction=0.5, train_steps=30, checkpoint_every=10)
    found = {}
    for how in ("off", "on"):
        work = tmp_path / how
        experiments.imp(s, work, DIGITS, execution=Execution("tensorflow", how))
        assert json.loads((work / "execution.json").read_text())["compact_training"] == how
        tickets = sorted(work.rglob("ticket.safetensors"))
        found[how] = [p.read_bytes() for p in tickets]
        _, about = storage.read_tensors(tickets[-1].with_name("trained.safetensors"))
        assert bool((about.get("decision") or {}).get("compact")) == (how == "on")
    assert len(found["on"]) == 7 and found["on"] == found["off"]
    with pytest.raises(UserError, match="was begun with --compact_training=on; give that, or"):
        experiments.imp(s, tmp_path / "on", DIGITS, execution=Execution(compact="off"))
    # One of before there was such a thing goes on as it began.
    path = tmp_path / "off" / "execution.json"
    told = json.loads(path.read_text())
    del told["compact_training"]
    path.write_text(json.dumps(told))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="was begun with --compact_training=off"):
            experiments.imp(s, tmp_path / "off", DIGITS, execution=Execution(compact="auto"))
        experiments.imp(s, tmp_path / "off", DIGITS)


def test_mistakes():
    with pytest.raises(UserError, match="unknown compact training 'of'; there are: auto, on, off"):
        Execution(compact="of")
    with pytest.raises(UserError, match="compact_training=on is for --engine=tensorflow or auto"):
        Trainer(spec(), DIGITS, execution=Execution("sparse", "on"))
    assert "no graph of layers" in compaction_of(_Own())


def compaction_of(model):
    model(np.zeros([1, 8, 8, 1], "float32"))
    with pytest.raises(ValueError) as refused:
        compaction.Net(model)
    return str(refused.value)
