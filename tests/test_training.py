"""The loop against hand-written oracles, on one device and two."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from lth_tf import datasets, masks, models, pruning, training
from lth_tf.compat import keras, tf
from lth_tf.datasets import augmentation
from lth_tf.errors import UserError
from lth_tf.scopes import SCOPES
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.training import OPTIMIZERS, Trainer, feeds, initial_weights

DIGITS = datasets.load("digits")
BASE = Spec(
    dataset="digits",
    model="lenet_20_10",
    validation_size=100,
    train_steps=60,
    eval_every=20,
    batch_size=30,
    compile="off",  # XLA takes longer to compile than these take to train
)

TWO = {"distribute": "mirrored", "devices": 2}

def spec(**changes):
    return dataclasses.replace(BASE, **changes)


def start(s, density=0.3, seed=0):
    """mask x weights and mask, magnitude-pruned at initialisation."""
    weights, kernels = initial_weights(s, (8, 8, 1), 10, seed)
    scores = SCORERS["magnitude"](None, {n: weights[n] for n in kernels})
    mask = SCOPES["layerwise"](scores, density)
    return masks.apply(mask, weights), mask


def run(s, stop=None, **options):
    weights, mask = start(s)
    return Trainer(s, DIGITS).train(weights, mask, 0, stop or s.train_steps, **options)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def eager(s, steps, update):
    """The same training written out in NumPy and one GradientTape, float64, no tricks."""
    weights, mask = start(s)
    model = models.build(s, (8, 8, 1), 10, 0)
    x, y = feeds.split(DIGITS, s.validation_size, s.seed)["train"]
    x = (x / 255.0 - np.array(DIGITS.mean)) / np.array(DIGITS.std)
    state = {n: [np.zeros_like(w), np.zeros_like(w)] for n, w in weights.items()}
    for step in range(steps):
        pruning.assign(model, weights)
        chosen = feeds.batch_indices(0, step, 1, len(y), s.batch_size)[0]
        images = augmentation.augment(tf.constant(x[chosen]), s.augmentation, 0, step)
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(
                y[chosen], model(images), from_logits=True
            )
            loss = tf.reduce_mean(losses)
        variables = pruning.weights(model)
        gradients = tape.gradient(loss, variables)
        rate = rate_by_hand(s, step)
        for n, w in weights.items():
            g = gradients[n].numpy()
            if s.optimizer != "adamw":
                g = g + s.weight_decay * w
            if n in mask:
                g = np.where(mask[n] != 0, g, 0.0)
            weights[n] = w - update(s, step, rate, g, w, state[n])
    return weights


def rate_by_hand(s, step):
    rate = s.learning_rate * s.lr_drop_factor ** sum(step >= drop for drop in s.lr_drops)
    if s.lr_schedule == "cosine":
        rate *= 0.5 + 0.5 * np.cos(np.pi * step / s.train_steps)
    if step < s.warmup_steps:
        rate *= (step + 1) / s.warmup_steps
    return rate


def sgd(s, step, rate, g, w, state):
    return rate * g


def momentum(s, step, rate, g, w, state):
    """v <- mu v + rate g, and v is taken (Sutskever et al. 2013, eq. 1 and 2)."""
    state[0] = s.momentum * state[0] + rate * g
    return state[0]


def nesterov(s, step, rate, g, w, state):
    """The same at the point looked ahead to, told by the weights that stand there:
    mu v + rate g with the new v (Sutskever et al. 2013, eq. 3 and 4).
    """
    return s.momentum * momentum(s, step, rate, g, w, state) + rate * g


def adam(s, step, rate, g, w, state):
    """Kingma and Ba 2015, before section 2.1: epsilon hat."""
    a, b = 0.9, 0.999
    state[0] += (g - state[0]) * (1 - 0.9)
    state[1] += (g**2 - state[1]) * (1 - 0.999)
    rate = rate * np.sqrt(1 - b ** (step + 1)) / (1 - a ** (step + 1))
    return rate * state[0] / (np.sqrt(state[1]) + 1e-7)


def adamw(s, step, rate, g, w, state):
    """Loshchilov and Hutter 2019, algorithm 2: the decay is no part of the gradient."""
    return adam(s, step, rate, g, w, state) + rate * s.weight_decay * w


HAND = {f.__name__: f for f in (sgd, momentum, nesterov, adam, adamw)}
RATES = {"sgd": 2**-3, "momentum": 2**-4, "nesterov": 2**-4, "adam": 2**-10, "adamw": 2**-10}
SHAPES = {
    "plain": {},
    "drops": {"lr_schedule": "steps", "lr_drops": (8, 15), "warmup_steps": 3, "weight_decay": 0.01},
    "cosine": {"lr_schedule": "cosine", "warmup_steps": 5},
}
BY_HAND = {f"{name}, {shape}": (name, SHAPES[shape]) for name in HAND for shape in SHAPES} | {
    "momentum, decay": ("momentum", {"weight_decay": 0.01}),
    "adamw, decay": ("adamw", {"weight_decay": 0.01}),
    "sgd, resized_crop": ("sgd", {"augmentation": "resized_crop"}),
}


def test_every_optimizer_is_written_out_by_hand():
    assert HAND.keys() == RATES.keys() == set(training.OPTIMIZERS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name, changes", BY_HAND.values(), ids=BY_HAND)
def test_loop_equals_a_training_written_out_by_hand(name, changes):
    # Constant rates are powers of 2, since Keras holds them in float32.
    exact = {"precision": "float64", "learning_rate": RATES[name]}
    s = spec(optimizer=name, train_steps=25, **exact, **changes)
    with training.policy("float64"):
        oracle = eager(s, 25, HAND[name])
    trained = run(s).weights
    for n in oracle:
        np.testing.assert_allclose(trained[n], oracle[n], rtol=1e-7, atol=1e-9)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("compile", ["on", "off"])
def test_same_bits_again_and_whatever_the_blocks_are(compile):
    s = spec(compile=compile)
    weights, mask = start(s)
    trainer = Trainer(s, DIGITS)
    first = trainer.train(weights, mask, 0, 60)
    other = start(s, seed=5)
    trainer.train(*other, 0, 40, seed=3)  # leaves nothing behind
    again = trainer.train(weights, mask, 0, 60)
    assert same(first.weights, again.weights)
    drop = [{k: v for k, v in row.items() if k != "seconds"} for row in first.rows]
    assert drop == [{k: v for k, v in row.items() if k != "seconds"} for row in again.rows]
    blocks = run(spec(eval_every=7, compile=compile))
    assert same(first.weights, blocks.weights)


def test_zeros_stay_and_kept_weights_move():
    s = spec()
    weights, mask = start(s)
    trained = run(s).weights
    for n, m in mask.items():
        assert not trained[n][m == 0].any()
        assert (trained[n] != weights[n])[m != 0].mean() > 0.5


@pytest.mark.sampled(5)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "momentum", "nesterov", "sgd"])
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("distribute", ["none", "mirrored"])
def test_zeros_hold_at_every_step(optimizer, precision, distribute):
    class Check(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            pruning.check(self.model, self.model.optimizer)
            Check.steps += 1

    s = spec(
        optimizer=optimizer,
        precision=precision,
        distribute=distribute,
        devices=2 if distribute == "mirrored" else None,
        weight_decay=1e-3,
        learning_rate=0.01,
        train_steps=6,
        eval_every=1,
        compile="on" if (optimizer, distribute) == ("adam", "none") else "off",
    )
    run(s, callbacks=[Check()])
    assert Check.steps == 6


def test_float16_scales_the_loss_and_repeats():
    s = spec(precision="mixed_float16", train_steps=20, eval_every=10)
    weights, mask = start(s)
    trainer = Trainer(s, DIGITS)
    assert type(trainer.optimizer).__name__.startswith("LossScale")
    first = trainer.train(weights, mask, 0, 20)
    assert same(first.weights, trainer.train(weights, mask, 0, 20).weights)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("augmentation", ["none", "flip_crop"])
def test_one_steps_gradient_on_two_replicas(augmentation):
    changes = {"optimizer": "sgd", "learning_rate": 1.0, "train_steps": 1, "eval_every": 1}
    changes["augmentation"] = augmentation
    one = run(spec(**changes)).weights
    two = run(spec(**TWO, **changes)).weights
    before, _ = start(BASE)
    for n in one:
        gradient = before[n] - one[n]
        difference = np.abs(one[n] - two[n]).max()
        assert difference <= 1e-6 * max(1e-3, np.abs(gradient).max()) + 6e-8


def test_float64_on_two_replicas_is_the_same_mathematics():
    one = run(spec(precision="float64"))
    two = run(spec(precision="float64", **TWO))
    for n in one.weights:
        np.testing.assert_allclose(two.weights[n], one.weights[n], rtol=1e-9, atol=1e-12)
    assert one.rows[-1]["validation_loss"] == pytest.approx(
        two.rows[-1]["validation_loss"], rel=1e-10
    )


def test_evaluation_counts_every_example_once_on_any_number_of_replicas():
    s = spec(validation_size=77, precision="float64")
    weights, mask = start(s)
    numbers = []
    for changes in ({}, TWO):
        trainer = Trainer(dataclasses.replace(s, **changes), DIGITS)
        trainer.train(weights, mask, 0, 0)
        numbers.append([trainer.evaluate(part) for part in ("train", "validation", "test")])
    model = trainer.model
    for part, (loss, accuracy) in zip(("train", "validation", "test"), numbers[0], strict=True):
        x, y = feeds.split(DIGITS, 77, 0)[part]
        x = (x / 255.0 - np.array(DIGITS.mean)) / np.array(DIGITS.std)
        logits = model(x).numpy()
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert loss == pytest.approx(-logs[np.arange(len(y)), y].mean(), rel=1e-9)
        assert accuracy == pytest.approx((logits.argmax(-1) == y).mean(), abs=1e-12)
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-12)


def test_rows_say_when_test_data_were_looked_at():
    rows = run(spec(train_steps=200, learning_rate=0.02)).rows
    assert [row["step"] for row in rows] == list(range(0, 201, 20))
    best = np.inf
    for row in rows[:-1]:
        assert (row["test_accuracy"] is not None) == (row["validation_loss"] < best)
        best = min(best, row["validation_loss"])
    assert rows[-1]["test_accuracy"] is not None
    assert rows[0]["loss"] is None and all(row["loss"] > 0 for row in rows[1:])


def test_capture_is_the_training_cut_short():
    s = spec(lr_schedule="cosine", warmup_steps=5)
    whole = run(s, capture=33)
    short = run(s, stop=33)
    assert same(whole.captured, short.weights)


def test_training_on_from_a_captured_step_sees_the_same_batches():
    s = spec(optimizer="sgd", learning_rate=0.1, lr_schedule="steps", lr_drops=(30,))
    whole = run(s, capture=20)
    _, mask = start(s)
    rest = Trainer(s, DIGITS).train(whole.captured, mask, 20, 60)
    assert same(rest.weights, whole.weights)  # plain SGD has no other state


def test_augmented_training_resumes_and_does_not_depend_on_blocks():
    s = spec(optimizer="sgd", learning_rate=0.1, augmentation="flip_crop")
    weights, mask = start(s)
    trainer = Trainer(s, DIGITS)
    whole = trainer.train(weights, mask, 0, 60, seed=3, capture=13)
    rest = Trainer(s, DIGITS).train(whole.captured, mask, 13, 60, seed=3)
    assert same(rest.weights, whole.weights)
    assert same(run(dataclasses.replace(s, eval_every=7), seed=3).weights, whole.weights)
    assert not same(run(dataclasses.replace(s, augmentation="none"), seed=3).weights, whole.weights)
    assert not same(trainer.train(weights, mask, 0, 60, seed=4).weights, whole.weights)


def test_callbacks_fire_at_boundaries_stop_and_change_the_rate():
    class Log(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.calls = []

        def on_train_begin(self, logs=None):
            self.calls.append("train")

        def on_epoch_begin(self, epoch, logs=None):
            self.calls.append(f"epoch {epoch}")

        def on_train_batch_end(self, batch, logs=None):
            self.calls.append(f"batch {batch}")

        def on_epoch_end(self, epoch, logs=None):
            self.calls.append(f"end {epoch} {logs['step']}")
            if epoch == 0:
                self.model.optimizer.learning_rate.assign(0.0)
            if epoch == 1:
                self.model.stop_training = True

        def on_train_end(self, logs=None):
            self.calls.append("over")

    log = Log()
    trained = run(spec(), callbacks=[log])
    assert log.calls == [
        "train", "epoch 0", "batch 19", "end 0 20", "epoch 1", "batch 39", "end 1 40", "over",
    ]  # fmt: skip
    assert [row["step"] for row in trained.rows] == [0, 20, 40]
    assert same(trained.weights, run(spec(), stop=20).weights)  # nothing moved at rate 0
    assert trained.rows[-1]["learning_rate"] == 0.0


def test_a_changed_rate_does_not_outlive_its_training():
    class Lower(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.optimizer.learning_rate.assign(0.0)

    weights, mask = start(BASE)
    trainer = Trainer(BASE, DIGITS)
    first = trainer.train(weights, mask, 0, 20)
    assert same(trainer.train(weights, mask, 0, 20, callbacks=[Lower()]).weights, weights)
    assert same(trainer.train(weights, mask, 0, 20).weights, first.weights)


def test_blocks_of_any_length_and_any_seed_share_one_graph():
    trainer = Trainer(spec(compile="on", augmentation="flip_crop"), DIGITS)
    trainer.train(*start(BASE), 0, 33)
    trainer.train(*start(BASE), 7, 20, seed=2**64 - 1)
    assert trainer.engine.steps.experimental_get_tracing_count() == 1


COUNTED = """
import numpy as np
from lth_tf import datasets, pruning
from lth_tf.spec import Spec
from lth_tf.training import Trainer

spec = Spec(
    model="lenet_9_8", dataset="digits", validation_size=100, batch_size=20, train_steps=60,
    eval_every=10, compile="on", distribute="none", checkpoint_every=7,
)
trainer = Trainer(spec, datasets.load("digits"))
weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
for seed, half in enumerate((False, True)):
    mask = {n: np.ones(v.shape) for n, v in pruning.kernels(trainer.model).items()}
    mask["fc1/kernel"][::2] -= half
    trainer._pace = 3
    trainer.train(weights, mask, 4 * seed, 60, seed=seed, capture=33, keep=lambda state: None)
"""


def test_xla_compiles_once_whatever_the_calls_are(tmp_path):
    """Traces do not show it: XLA's own cache has a file for each program that it compiled."""
    flags = f"--tf_xla_persistent_cache_directory={tmp_path}"
    subprocess.run(
        [sys.executable, "-c", COUNTED], check=True, env={**os.environ, "TF_XLA_FLAGS": flags}
    )
    assert len(list(tmp_path.iterdir())) == 1


def test_keras_own_callbacks_work():
    plateau = keras.callbacks.ReduceLROnPlateau(
        monitor="validation_loss", factor=0.5, patience=0, min_delta=10.0
    )
    rows = run(spec(), callbacks=[plateau]).rows
    assert rows[-1]["learning_rate"] < BASE.learning_rate


def test_diverging_names_the_step():
    s = spec(optimizer="sgd", learning_rate=1e30)
    with pytest.raises(training.DivergedError, match=r"at step \d+; lower --learning_rate"):
        run(s)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 2000}, "batch_size 2000 exceeds"),
        ({"validation_size": 1000}, "more than half"),
        ({"distribute": "mirrored", "devices": 5}, "5 are asked for, but of CPUs .* has 4 .*CPU:3"),
        ({"devices": 2}, "devices 2 are asked for, but of GPUs this machine has none; give"),
        ({**TWO, "batch_size": 31}, "multiple of 2"),
        ({**TWO, "compile": "on"}, "compile=on does not work where 2"),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(UserError, match=words):
        Trainer(spec(**changes), DIGITS)


def test_xla_and_plain_graph_agree():
    on = run(spec(precision="float64", compile="on"))
    off = run(spec(precision="float64", compile="off"))
    for n in on.weights:
        np.testing.assert_allclose(on.weights[n], off.weights[n], rtol=1e-9, atol=1e-12)


def test_dropout_noise_repeats_and_rewinds():
    s = spec(model="conv2_dropout", train_steps=4, eval_every=2, batch_size=10)
    weights, mask = start(s)
    trainer = Trainer(s, DIGITS)
    first = trainer.train(weights, mask, 0, 4, capture=2)
    assert first.weights["drop_fc1/count"] == 4 and first.captured["drop_fc1/count"] == 2
    assert same(first.weights, trainer.train(weights, mask, 0, 4).weights)


def test_schedule_reaches_the_optimizer():
    s = spec(lr_schedule="steps", lr_drops=(20, 40), warmup_steps=10, learning_rate=0.1)
    rates = [row["learning_rate"] for row in run(s).rows]  # of the step to come
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


# The constants of optimizers in float64.


def by_hand(name, w, gradients, rate, epsilon):
    """The papers' formulas in float64."""
    m = v = np.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        if name.startswith("adam"):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            if name == "adamw":
                w = w - rate * 0.01 * w
            root = np.sqrt(1 - 0.999**t)
            w = w - rate * root / (1 - 0.9**t) * m / (np.sqrt(v) + epsilon)
        else:
            m = (0.9 if name != "sgd" else 0.0) * m - rate * g
            w = w + (0.9 * m - rate * g if name == "nesterov" else m)
    return w


@pytest.mark.parametrize("epsilon", [1e-7, 1e-2])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_optimizers_compute_in_float64_with_constants_of_float64(name, epsilon):
    rng = np.random.default_rng(0)
    w, gradients = rng.normal(size=5), rng.normal(size=(4, 5))
    made = Spec(
        optimizer=name, precision="float64", learning_rate=0.01, weight_decay=0.01,
        adam_epsilon=epsilon,
    )  # fmt: skip
    with models.policy("float64"):
        optimizer = OPTIMIZERS[name](made.learning_rate, made)
        variable = tf.Variable(w)
        optimizer.build([variable])
    for g in gradients:
        optimizer.apply_gradients([(tf.constant(g), variable)])
    wanted = by_hand(name, w, gradients, 0.01, epsilon)
    assert np.abs(variable.numpy() / wanted - 1).max() < 1e-13
