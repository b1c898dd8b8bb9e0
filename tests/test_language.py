"""Recurrent networks: the task 'language', GRUs, and masks on their kernels."""

import dataclasses
import os
import pathlib

import numpy as np
import pytest

from lth_tf import analysis, datasets, experiments, masks, pruning, tickets
from lth_tf.analysis import flops
from lth_tf.compat import keras, tf
from lth_tf.datasets import DATASETS, Dataset
from lth_tf.errors import UserError
from lth_tf.experiments import measured, picking
from lth_tf.models import MODELS, Blueprint, build
from lth_tf.scorers import score
from lth_tf.spec import Spec
from lth_tf.tasks import TASKS, metric_of, spoken, task_of
from lth_tf.training import Interrupted, Trainer
from tests.test_dynamic import began as begin_on

TASK = TASKS["language"]
SHAPE, CLASSES = (8,), 5


def texts(data_dir=None):
    """A text in which a character depends on the two before it, but for some."""
    rng, text = np.random.default_rng(0), [0, 1]
    for noise in rng.random(8 * 400):
        text.append((text[-1] + 2 * text[-2] + 1) % CLASSES if noise < 0.9 else int(noise * 50) % 5)
    x = np.array(text[: 8 * 400], np.int32).reshape(-1, 8)
    y = np.array(text[1 : 8 * 400 + 1], np.int64).reshape(-1, 8)
    about = {"classes": CLASSES, "mean": (0.0,), "std": (1.0,), "task": "language"}
    return Dataset("texts", x[:320], y[:320], x[320:], y[320:], **about)


TEXTS = texts()
SPEC = Spec(
    recipe="sparse", method="rigl", scope="erk", density=(0.3,), model="gru_4_6", dataset="texts",
    validation_size=40, batch_size=20, train_steps=20, eval_every=10, update_every=5,
    learning_rate=0.02, precision="float64", distribute="none", checkpoint_every=0,
)  # fmt: skip


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(DATASETS._entries, "texts", texts)


# --- The task ---


def test_losses_are_means_over_positions_in_nats_and_the_metric_is_in_bits():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 5)), rng.integers(0, 5, (3, 4))
    logged = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logged, labels[..., None], -1)[..., 0].mean(1)
    np.testing.assert_allclose(TASK.losses(labels, tf.constant(logits)), expected)
    np.testing.assert_allclose(TASK.hits(labels, tf.constant(logits)), expected / np.log(2))
    assert not TASK.higher and TASK.form.format(1.23456) == "1.235"
    assert metric_of(["test_loss", "test_bits_per_character"]) == TASK.metric
    assert task_of("bits_per_character") is TASK and spoken(TASK.metric) == "bits per character"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_labels": np.zeros(320, int)}, r"train labels of shape \[320\].*\[320, 8\]"),
        ({"test_labels": np.zeros((80, 8))}, "type float64.*whole number for each position"),
        ({"train_labels": np.full((320, 8), 5)}, "the train label 5; with 5 classes they go"),
        ({"classes": 1}, r"1 class\(es\); a network needs two or more"),
    ],
)
def test_labels_are_a_class_for_each_position(change, said):
    with pytest.raises(UserError, match=f"data set 'texts' has .*{said}"):
        dataclasses.replace(TEXTS, **change)
    assert TEXTS.train_labels.dtype == np.int32


@pytest.mark.parametrize(
    ("changes", "data", "said"),
    [
        ({"model": "lenet_5"}, TEXTS, r"'lenet_5' puts out \[5\] for .* language, wants \[8, 5\]"),
        ({}, datasets.load("digits"), r"'gru_4_6' takes sequences of whole numbers.*\[8, 8, 1\]"),
        ({"augmentation": "flip_crop"}, TEXTS, r"augmentation 'flip_crop' is for images.*\[8\]"),
        ({"label_smoothing": 0.1}, TEXTS, "label_smoothing has no meaning for the task 'language'"),
    ],
)
def test_what_does_not_go_together_is_said(changes, data, said):
    with pytest.raises(UserError, match=said):
        Trainer(spec(**changes), data)


# --- The network ---


def by_hand(weights, x):
    """Logits of a GRU, written out: reset gates behind the product, as cuDNN has it."""

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    w = {name.split("/")[-1] if "gru" in name else name: v for name, v in weights.items()}
    units = w["recurrent_kernel"].shape[0]
    state, found = np.zeros((len(x), units)), []
    for t in range(x.shape[1]):
        inputs = w["embedding/embeddings"][x[:, t]] @ w["kernel"] + w["bias"][0]
        before = state @ w["recurrent_kernel"] + w["bias"][1]
        z, r = (sigmoid(inputs[:, s] + before[:, s])
                for s in (slice(0, units), slice(units, 2 * units)))  # fmt: skip
        new = np.tanh(inputs[:, 2 * units :] + r * before[:, 2 * units :])
        state = z * state + (1 - z) * new
        found.append(state @ w["output/kernel"] + w["output/bias"])
    return np.stack(found, 1)


def test_a_pruned_gru_computes_with_what_is_kept():
    model = Blueprint(SPEC, SHAPE, CLASSES).pruned()
    kernels = pruning.kernels(model)
    assert list(kernels) == [
        "gru/gru_cell/kernel", "gru/gru_cell/recurrent_kernel", "output/kernel"
    ]  # fmt: skip
    rng = np.random.default_rng(3)
    mask = {n: (rng.random(v.shape) < 0.5).astype(np.uint8) for n, v in kernels.items()}
    weights = pruning.weights(model)
    full = {n: v.numpy() + rng.normal(size=v.shape) * 0.3 for n, v in weights.items()}
    pruning.assign(model, full)
    for (_, variable), name in zip(pruning.mask_variables(model), mask, strict=True):
        variable.assign(mask[name].astype(variable.dtype.as_numpy_dtype))
    x = rng.integers(0, CLASSES, (6, 8))
    np.testing.assert_allclose(model(x).numpy(), by_hand(masks.apply(mask, full), x), rtol=1e-9)


def test_weights_are_a_function_of_the_seed_and_sizes_of_the_name():
    one, two, other = (build(SPEC, SHAPE, CLASSES, seed) for seed in (0, 0, 1))
    for a, b, c in zip(one.weights, two.weights, other.weights, strict=True):
        assert np.array_equal(a, b) and ("bias" in a.name or not np.array_equal(a, c))
    r = pruning.kernels(one)["gru/gru_cell/recurrent_kernel"].numpy()
    np.testing.assert_allclose(r @ r.T, np.eye(6), atol=1e-6)
    with pytest.raises(UserError, match="gru_E_H"):
        MODELS["gru_4"]


def test_every_position_is_counted_and_embeddings_are_not():
    model = build(SPEC, SHAPE, CLASSES, 0)
    assert set(flops.positions(model).values()) == {8}
    last = keras.Sequential([keras.Input((8, 3)), keras.layers.GRU(2), keras.layers.Dense(4)])
    assert list(flops.positions(last).values()) == [8, 8, 1]


def test_paths_lead_through_recurrent_kernels():
    model = build(SPEC, SHAPE, CLASSES, 0)
    mask = {n: np.zeros(v.shape, np.uint8) for n, v in pruning.kernels(model).items()}
    kernel, recurrent, output = mask.values()
    kernel[0, 0] = kernel[1, 7] = 1  # of unit 0 a gate, of unit 1 another
    recurrent[0, 2] = recurrent[1, 3] = recurrent[4, 5] = 1  # 0 -> 2, 1 -> 3; nothing reaches 4
    output[2, 0] = output[5, 1] = 1
    through = analysis.connected(model, mask)
    assert [int(m.sum()) for m in through.values()] == [1, 1, 1]
    assert through["gru/gru_cell/kernel"][0, 0] == through["output/kernel"][2, 0] == 1
    assert through["gru/gru_cell/recurrent_kernel"][0, 2] == 1


# --- Tickets ---


@pytest.mark.sampled(2)
@pytest.mark.parametrize("scorer", ["snip", "grasp", "synflow", "fisher_diag", "hessian_diag"])
def test_scorers_score_recurrent_kernels(scorer):
    s = Spec(**{**only_shared(), "recipe": "one_shot", "scope": "global", "scorer": scorer,
                "density": (0.3,), "samples_per_class": 4})  # fmt: skip
    model, data = build(s, SHAPE, CLASSES, 0), picking.batches(s, TEXTS, 0)
    assert sum(len(y) for _, y in data) == 20  # no classes of examples: as many drawn at random
    found = score(model, scorer, data, **picking.options(s, 0))
    assert {n: v.shape for n, v in found.items()} == {
        n: tuple(v.shape) for n, v in pruning.kernels(model).items()
    }
    if scorer == "snip":
        (x, y), kernels = data[0], pruning.kernels(model)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x))
            )  # fmt: skip
        gradients = tape.gradient(loss, list(kernels.values()))
        expected = [np.abs(w.numpy() * g.numpy())
                    for w, g in zip(kernels.values(), gradients, strict=True)]  # fmt: skip
        total = sum(e.sum() for e in expected)
        for name, e in zip(kernels, expected, strict=True):
            np.testing.assert_allclose(found[name], e / total, rtol=1e-4, atol=1e-9)
    assert all(np.isfinite(v).all() and np.any(v != 0) for v in found.values())


def only_shared():
    from lth_tf.spec import fields_of, owners

    return {n: getattr(SPEC, n) for n in fields_of() if not owners(n) and n != "recipe"}


def began(s):
    import tests.test_dynamic

    before, tests.test_dynamic.DIGITS = tests.test_dynamic.DIGITS, TEXTS
    try:
        return begin_on(s, inputs=(SHAPE, CLASSES))
    finally:
        tests.test_dynamic.DIGITS = before


def test_a_moving_mask_holds_and_a_training_is_resumed_bit_for_bit():
    trainer, ticket, mover = began(SPEC)
    whole = trainer.train(ticket.weights, ticket.mask, 0, 20, mover=mover)
    for name, m in whole.mask.items():
        assert m.sum() == ticket.mask[name].sum() and not np.any(whole.weights[name][m == 0])
    assert any((whole.mask[n] != m).any() for n, m in ticket.mask.items())
    again, kept = iter([False] + [True] * 99), []
    trainer._pace = 6
    with pytest.raises(Interrupted):
        trainer.train(
            ticket.weights, ticket.mask, 0, 20, mover=began(SPEC)[2], keep=kept.append,
            asked=lambda: next(again),
        )  # fmt: skip
    resumed = trainer.train(
        ticket.weights, ticket.mask, 0, 20, mover=began(SPEC)[2], state=kept[0]
    )
    assert all(w.tobytes() == resumed.weights[n].tobytes() for n, w in whole.weights.items())


@pytest.mark.slow
def test_two_replicas_move_the_masks_of_one():
    trainer, ticket, mover = began(SPEC)
    whole = trainer.train(ticket.weights, ticket.mask, 0, 20, mover=mover)
    several, ticket, mover = began(spec(distribute="mirrored", devices=2))
    shared = several.train(ticket.weights, ticket.mask, 0, 20, mover=mover)
    assert all(np.array_equal(m, shared.mask[n]) for n, m in whole.mask.items())
    assert all(np.abs(w - shared.weights[n]).max() < 1e-9 for n, w in whole.weights.items())


def test_tickets_are_found_iteratively_and_told_in_bits_per_character(tmp_path):
    s = Spec(**{**only_shared(), "train_steps": 100, "precision": "float32", "levels": 2,
                "learning_rate": 0.03, "measure": ("gradient_flow",)})  # fmt: skip
    rows = experiments.run(s, tmp_path, TEXTS)
    assert [row["level"] for row in rows] == [0, 1, 2]
    assert rows[0]["test_bits_per_character_end"] < 1.7 < np.log2(5)
    ticket = tickets.load_ticket(tmp_path / "replicate_00/level_02/ticket.safetensors")
    ends = tickets.solution(tmp_path / "replicate_00/level_02/trained.safetensors", ticket)
    ends.verify()
    assert rows[2]["inference_flops"] == pytest.approx(ticket.density)
    assert measured.read(tmp_path, measured.UPDATES) == []
    assert "bits" in (tmp_path / "summary.csv").read_text().splitlines()[0]


# --- Shakespeare ---


def test_tiny_shakespeare_is_read_in_pieces():
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "")) / "tiny_shakespeare"
    if not os.environ.get("TFDS_DATA_DIR") or not folder.is_dir():
        pytest.skip("TFDS_DATA_DIR has no tiny_shakespeare")
    data = datasets.load("tiny_shakespeare")
    assert data.train_inputs.shape == (15_685 + 871, 64) and data.test_inputs.shape == (871, 64)
    assert data.classes == 65 and data.task == "language"
    assert np.array_equal(data.train_labels[:, :-1], data.train_inputs[:, 1:])
    assert np.array_equal(data.train_labels[:100, -1], data.train_inputs[1:101, 0])
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    codes = np.array(sorted("\n !$&',-.3:;?" + letters))
    assert "".join(codes[data.train_inputs[0]]).startswith("First Citizen:\nBefore we proceed")
