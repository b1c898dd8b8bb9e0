"""Every entry of every registry keeps the promises of its kind."""

import dataclasses

import numpy as np
import pytest

from lth_tf import datasets, masks, pruning, training
from lth_tf.branches import BRANCHES
from lth_tf.compat import keras, tf
from lth_tf.datasets import Dataset
from lth_tf.experiment import Laboratory, branch
from lth_tf.flags import REGISTRIES
from lth_tf.models import INITS, MODELS
from lth_tf.schedules import LR_SCHEDULES
from lth_tf.scopes import SCOPES, count
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.training import OPTIMIZERS, Trainer

SHAPE = (8, 8, 3)


def tiny_model():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 3, activation="relu", name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Flatten(name="flatten"),
            keras.layers.Dense(5, activation="relu", name="fc"),
            keras.layers.Dense(3, name="output"),
        ]
    )
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        # Larger in the small output layer, which a global ranking would else empty.
        variable.assign(rng.normal(size=variable.shape) * (9 / variable.shape[0]) ** 0.5)
    return model


def batches():
    rng = np.random.default_rng(1)
    return [(rng.normal(size=(6, 6, 6, 2)).astype("float32"), np.arange(6) % 3)]


def state(model):
    return {n: v.numpy().copy() for n, v in pruning.weights(model).items()}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scorer_and_scope(scorer, scope, density):
    model = tiny_model()
    before, kernels = state(model), pruning.kernels(model)
    scores = SCORERS[scorer](model, kernels, batches())
    assert scores.keys() == kernels.keys()
    for name, s in scores.items():
        assert s.shape == kernels[name].shape and s.dtype in (np.float32, np.float64)
        assert np.isfinite(s).all()
    assert all(np.array_equal(before[n], w) for n, w in state(model).items())
    mask = SCOPES[scope](scores, density)
    again = SCOPES[scope](SCORERS[scorer](model, kernels, batches()), density)
    assert all(np.array_equal(mask[n], again[n]) for n in mask)
    if scope == "layerwise":
        wanted = sum(count(density, m.size) for m in mask.values())
    else:
        wanted = count(density, masks.size(mask))
    assert masks.kept(mask) == wanted
    assert all(set(np.unique(m)) <= {0, 1} and m.dtype == np.uint8 for m in mask.values())
    nested = SCOPES[scope](scores, density / 2, within=mask)
    assert masks.is_subset(nested, mask)
    tied = SCOPES[scope]({n: np.zeros_like(s) for n, s in scores.items()}, 0.98)
    assert masks.kept(tied) == (
        sum(count(0.98, m.size) for m in mask.values())
        if scope == "layerwise"
        else count(0.98, masks.size(mask))
    )


@pytest.mark.parametrize("name", [*MODELS, "lenet_7_5_3"])
def test_model_wraps_trains_and_repeats(name):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *SHAPE), dtype=np.uint8)
    labels = (np.arange(40) % 4).astype(np.int32)
    data = Dataset("toy", images, labels, images[:8], labels[:8], 4, (0.5,) * 3, (0.25,) * 3)
    spec = Spec(
        dataset="digits", model=name, validation_size=8, batch_size=4, train_steps=2, eval_every=1
    )
    trainer = Trainer(spec, data)
    weights, kernels = training.initial_weights(spec, SHAPE, 4, seed=3)
    again, _ = training.initial_weights(spec, SHAPE, 4, seed=3)
    other, _ = training.initial_weights(spec, SHAPE, 4, seed=4)
    assert all(np.array_equal(weights[n], again[n]) for n in weights)
    assert not any(np.array_equal(weights[n], other[n]) for n in kernels)
    scores = SCORERS["magnitude"](None, {n: weights[n] for n in kernels})
    mask = SCOPES["layerwise"](scores, 0.3)
    trained = trainer.train(masks.apply(mask, weights), mask, 0, 2)
    assert all(not trained.weights[n][m == 0].any() for n, m in mask.items())
    assert pruning.kinds(trainer.model)[kernels[-1]] == "output"
    with pruning.plain(trainer.model) as model:
        logits = model(tf.zeros((2, *SHAPE)))
    assert logits.shape == (2, 4)
    assert not np.allclose(tf.reduce_sum(logits, -1), 1)  # logits, not probabilities


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A ticket of density about 0.4 that a real run made."""
    spec = Spec(
        dataset="digits", model="lenet_20_10", validation_size=100, train_steps=30, eval_every=30,
        batch_size=30, levels=1, prune_fraction=0.6,
    )  # fmt: skip
    lab = Laboratory(spec, tmp_path_factory.mktemp("lab"), datasets.load("digits"))
    dense = lab.dense(0)
    trained = lab.train(lab.workdir / "dense", dense)
    return lab.prune(dense, trained, dense.weights, 1)


@pytest.mark.parametrize("name", BRANCHES)
def test_branch_changes_something_repeats_and_stays_valid(name, pruned):
    control, again = branch(pruned, name), branch(pruned, name)
    control.verify()
    changed = [
        n
        for part in ("mask", "weights")
        for n, a in getattr(pruned, part).items()
        if not np.array_equal(a, getattr(control, part)[n])
    ]
    assert changed
    for part in ("mask", "weights"):
        for n, a in getattr(control, part).items():
            assert np.array_equal(a, getattr(again, part)[n])
    assert masks.kept(control.mask) == masks.kept(pruned.mask)
    assert control.level == pruned.level and control.origin["arm"] == name
    other = dataclasses.replace(pruned, origin={**pruned.origin, "seed": 99})
    assert any(
        not np.array_equal(a, branch(other, name).weights[n]) for n, a in control.weights.items()
    )


@pytest.mark.parametrize("name", INITS)
def test_init_repeats_and_differs(name):
    a, b, c = (INITS[name](seed)((50, 40)).numpy() for seed in (0, 0, 1))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert abs(a.mean()) < 0.02 and 0.1 < a.std() < 0.3


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_schedule_starts_at_one_and_never_rises(name):
    values = LR_SCHEDULES[name](np.arange(100), 100, drops=[40, 60], factor=0.1)
    assert values.shape == (100,) and values[0] == 1
    assert (np.diff(values) <= 0).all() and (values >= 0).all()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_maskable(name):
    pruning.require_maskable(OPTIMIZERS[name](0.01, Spec()))


def test_every_registry_that_a_spec_names_is_known_to_the_flags():
    named = {f.metadata["registry"] for f in dataclasses.fields(Spec) if "registry" in f.metadata}
    assert named == set(REGISTRIES)
