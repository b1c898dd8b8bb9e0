"""Start weights that know the mask, smoothed labels, and the networks that came with them."""

import dataclasses

import numpy as np
import pytest

from lth_tf import datasets, experiments, masks, pruning, tickets
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.experiments import growing
from lth_tf.models import build
from lth_tf.spec import Spec
from lth_tf.training import Trainer

DIGITS = datasets.load("digits")


def ticket_of(kind, shape=(3, 3, 40, 60), density=0.1):
    rng = np.random.default_rng(0)
    weights = {"a/kernel": rng.normal(size=shape), "a/bias": np.ones(shape[-1])}
    mask = {"a/kernel": (rng.random(shape) < density).astype(np.uint8)}
    mask["a/kernel"][..., :5] = 0
    mask["a/kernel"][1, 1, 0, :2] = 1  # units of one input
    spec = Spec(recipe="sparse", sparse_init=kind)
    return tickets.Ticket(mask, masks.apply(mask, weights), 1, 0, {}, spec)


@pytest.mark.parametrize("kind", ["none", "fan_in", "fan_avg", "layer"])
def test_each_weight_is_scaled_by_what_its_unit_keeps(kind):
    before = ticket_of(kind)
    after = growing.scaled(before)
    w, m = before.weights["a/kernel"], before.mask["a/kernel"]
    want = np.zeros(w.shape)
    for h, v, i, j in np.ndindex(*w.shape):
        if m[h, v, i, j]:
            inputs, outputs = int(m[..., j].sum()), int(m[:, :, i].sum())
            want[h, v, i, j] = w[h, v, i, j] * {
                "none": 1, "fan_in": np.sqrt(9 * 40 / inputs),
                "fan_avg": np.sqrt(9 * 100 / (inputs + outputs)),
                "layer": np.sqrt(m.size / m.sum()),
            }[kind]  # fmt: skip
    assert np.allclose(after.weights["a/kernel"], want, rtol=1e-12)
    assert np.array_equal(after.weights["a/bias"], before.weights["a/bias"])
    assert all(np.array_equal(after.mask[n], x) for n, x in before.mask.items())


def test_a_units_sum_has_the_variance_of_a_dense_one():
    rng = np.random.default_rng(1)
    shape = (400, 3000)
    weights = {"k": rng.normal(0, np.sqrt(1 / 400), shape)}
    mask = {"k": (rng.random(shape) < rng.random(shape[1]) * 0.2 + 0.01).astype(np.uint8)}
    spec = Spec(recipe="sparse", sparse_init="fan_in")
    ticket = tickets.Ticket(mask, masks.apply(mask, weights), 1, 0, {}, spec)
    assert (growing.scaled(ticket).weights["k"] ** 2).sum(0).mean() == pytest.approx(1, abs=0.02)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("recipe", ["one_shot", "sparse"])
def test_tickets_and_controls_start_scaled(recipe, tmp_path):
    method = {"method": "static"} if recipe == "sparse" else {"scorer": "random"}
    spec = Spec(
        recipe=recipe, model="lenet_12_9", dataset="digits", validation_size=100, train_steps=4,
        eval_every=4, density=(0.2,), controls=("shuffle",), scope="layerwise", **method,
    )  # fmt: skip
    found = {}
    for kind in ("none", "fan_in"):
        work = tmp_path / kind
        experiments.run(dataclasses.replace(spec, sparse_init=kind), work, DIGITS)
        level = work / "replicate_00" / "level_01"
        for arm, folder in (("ticket", level), ("shuffle", level / "branch_shuffle")):
            found[kind, arm] = tickets.load_ticket(folder / "ticket.safetensors")
    for arm in ("ticket", "shuffle"):
        plain, scaled = found["none", arm], found["fan_in", arm]
        assert all(np.array_equal(m, scaled.mask[n]) for n, m in plain.mask.items())
        again = growing.scaled(dataclasses.replace(plain, spec=scaled.spec))
        assert all(np.array_equal(w, scaled.weights[n]) for n, w in again.weights.items())
        assert any(not np.array_equal(w, scaled.weights[n]) for n, w in plain.weights.items())
        assert scaled.spec.sparse_init == "fan_in"  # the ticket says so


def test_smoothed_labels_are_those_of_keras_and_count_in_training_only():
    spec = Spec(
        model="lenet_12_9", dataset="digits", validation_size=100, train_steps=1, eval_every=1,
        batch_size=20, precision="float64", label_smoothing=0.1, optimizer="sgd", compile="off",
        learning_rate=0.5, distribute="none",
    )  # fmt: skip
    trainer = Trainer(spec, DIGITS)
    weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
    mask = masks.ones({n: tuple(v.shape) for n, v in pruning.kernels(trainer.model).items()})
    trained = trainer.train(weights, mask, 0, 1)
    plain = Trainer(dataclasses.replace(spec, label_smoothing=0.0), DIGITS)
    other = plain.train(weights, mask, 0, 1)
    assert trained.rows[0]["validation_loss"] == other.rows[0]["validation_loss"]
    pruning.assign(trainer.model, weights)
    x, y = trainer.feed.batch(
        trainer.feed.take(trainer.feed.begin(0, 1, 0), 0), tf.constant(0, tf.uint64), tf.constant(0)
    )
    loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    with tf.GradientTape() as tape:
        value = loss(tf.one_hot(y, 10, dtype=tf.float64), trainer.model(x, training=True))
    assert float(value) == pytest.approx(trained.rows[1]["loss"], rel=1e-12)
    variables = trainer.model.trainable_variables
    names = {id(v): n for n, v in pruning.weights(trainer.model).items()}
    for v, g in zip(variables, tape.gradient(value, variables), strict=True):
        name = names[id(v)]
        assert np.allclose(trained.weights[name], weights[name] - 0.5 * g.numpy(), atol=1e-14)


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("lenet5_classic", 44_426),
        ("lenet5_3_3_27_20", 2_399),  # small_dense of Evci et al. 2022
        ("wrn_16_4", 2_748_890),
        ("wrn_40_1", 563_930),
    ],
)
def test_networks_have_the_published_sizes(name, parameters):
    shape = (28, 28, 1) if "lenet" in name else (32, 32, 3)
    model = build(Spec(model=name), shape, 10, 0)
    assert sum(int(np.prod(v.shape)) for v in model.trainable_variables) == parameters


def test_a_depth_that_there_is_not():
    with pytest.raises(UserError, match="its depth is not 6 n"):
        build(Spec(model="wrn_20_2"), (32, 32, 3), 10, 0)
