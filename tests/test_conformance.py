"""Every entry of every registry keeps the promises of its kind."""

import dataclasses
import functools
import inspect

import numpy as np
import pytest

from lth_tf import datasets, masks, pruning, training
from lth_tf.compat import keras, tf
from lth_tf.datasets import Dataset
from lth_tf.dynamic import METHODS, move
from lth_tf.errors import UserError
from lth_tf.experiments import Laboratory, branch, branches, growing
from lth_tf.experiments.branches import BRANCHES
from lth_tf.flags import REGISTRIES
from lth_tf.models import INITS, MODELS
from lth_tf.recipes import RECIPES
from lth_tf.schedules import LR_SCHEDULES
from lth_tf.scopes import SCOPES, count
from lth_tf.scorers import SCORERS, one_shot_mask
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import OPTIMIZERS, Trainer


def tiny_model():
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 2, activation="relu", name="conv"),
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


@functools.cache
def scored(scorer, **options):
    """The scores of the tiny model, which they leave as it is, bit for bit."""
    model = tiny_model()
    before, variables = state(model), list(model.weights)
    scores = SCORERS[scorer](model, pruning.kernels(model), batches(), **options)
    assert all(before[n].tobytes() == w.tobytes() for n, w in state(model).items())
    assert all(v is w for v, w in zip(model.weights, variables, strict=True))
    return scores


@pytest.mark.sampled(5)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scorer_repeats_is_finite_and_takes_every_kernel(scorer):
    scores, again = scored(scorer), scored.__wrapped__(scorer)
    kernels = pruning.kernels(tiny_model())
    assert list(scores) == list(kernels)
    for name, s in scores.items():
        assert isinstance(s, np.ndarray) and s.dtype in (np.float32, np.float64)
        assert s.shape == kernels[name].shape and np.isfinite(s).all()
        assert s.tobytes() == again[name].tobytes()
        assert len(np.unique(s)) > 2
    if SCORERS.about(scorer).draws:
        assert not np.array_equal(scored(scorer, seed=1)["conv/kernel"], scores["conv/kernel"])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_scorer_and_scope(scorer, scope, density):
    scores = scored(scorer)
    choose = functools.partial(SCOPES[scope], min_per_layer=0)

    def wanted(density):
        if scope == "layerwise":
            return sum(count(density, s.size) for s in scores.values())
        return count(density, masks.size(scores))

    mask, again = choose(scores, density), choose(scored(scorer), density)
    assert all(np.array_equal(mask[n], again[n]) for n in mask)
    assert masks.kept(mask) == wanted(density)
    assert list(mask) == list(scores)
    assert all(set(np.unique(m)) <= {0, 1} and m.dtype == np.uint8 for m in mask.values())
    nested = choose(scores, density / 2, within=mask)
    assert masks.is_subset(nested, mask) and masks.kept(nested) == wanted(density / 2)
    tied = choose({n: np.zeros_like(s) for n, s in scores.items()}, 0.98)
    assert masks.kept(tied) == wanted(0.98)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("scorer", SCORERS)
def test_one_shot_mask_is_exact_and_leaves_the_model_as_it_is(scorer, scope):
    model = tiny_model()
    before = state(model)
    mask = one_shot_mask(
        model, scorer, batches(), density=0.3, scope=scope, rounds=2, min_per_layer=1
    )
    exact = [count(0.3, m.size) for m in mask.values()]
    total = sum(exact) if scope == "layerwise" else count(0.3, masks.size(mask))
    assert masks.kept(mask) == total and all(m.any() for m in mask.values())
    assert all(before[n].tobytes() == w.tobytes() for n, w in state(model).items())


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [*MODELS, "lenet_7_5_3"])
def test_model_wraps_trains_and_repeats(name, request):
    thin = "width" in inspect.signature(MODELS[name]).parameters
    side = max(8, MODELS.about(name).smallest or 1)
    shape = (side, side, 3)
    spec = Spec(
        dataset="digits", model=name, width=1 / 16 if thin else 1.0, validation_size=8,
        batch_size=4, train_steps=2, eval_every=2, compile="off", seed=3,
    )  # fmt: skip
    weights, kernels = training.initial_weights(spec, shape, 4, seed=3)
    other, _ = training.initial_weights(spec, shape, 4, seed=4)
    assert not any(np.array_equal(weights[n], other[n]) for n in kernels)
    if MODELS.about(name).like:  # more of the blocks that that one has: too slow to train here
        again, _ = training.initial_weights(spec, shape, 4, seed=3)
        assert all(np.array_equal(weights[n], again[n]) for n in weights)
        return
    if thin and name != "vgg11":  # tracing would take most of the time
        tf.config.run_functions_eagerly(True)
        request.addfinalizer(lambda: tf.config.run_functions_eagerly(False))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, *shape), dtype=np.uint8)
    labels = (np.arange(40) % 4).astype(np.int32)
    data = Dataset("toy", images, labels, images[:8], labels[:8], 4, (0.5,) * 3, (0.25,) * 3)
    trainer = Trainer(spec, data)
    again = state(trainer.model)
    assert all(np.array_equal(weights[n], again[n]) for n in weights)
    scores = SCORERS["magnitude"](None, {n: weights[n] for n in kernels})
    mask = SCOPES["layerwise"](scores, 0.3)
    trained = trainer.train(masks.apply(mask, weights), mask, 0, 2)
    assert all(not trained.weights[n][m == 0].any() for n, m in mask.items())
    assert pruning.kinds(trainer.model)[kernels[-1]] == "output"
    with pruning.plain(trainer.model) as model:
        logits = model(tf.zeros((2, *shape)))
    assert logits.shape == (2, 4)
    assert not np.allclose(tf.reduce_sum(logits, -1), 1)  # logits, not probabilities


TINY = {
    "dataset": "digits", "model": "lenet_20_10", "validation_size": 100, "train_steps": 30,
    "eval_every": 30, "batch_size": 30, "scope": "global", "compile": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Recipe -> a ticket of density 0.4 that a real run made, and what it was cut out of."""
    data = datasets.load("digits")
    trained = Laboratory(
        Spec(levels=1, prune_fraction=0.6, **TINY), tmp_path_factory.mktemp("lab"), data
    )
    dense = trained.dense(0)
    after = trained.train(trained.workdir / "dense", dense)
    picked = Laboratory(
        Spec(recipe="one_shot", density=(0.4,), samples_per_class=2, **TINY),
        tmp_path_factory.mktemp("lab"),
        data,
    )
    sown = Laboratory(
        Spec(recipe="sparse", density=(0.4,), update_every=2, **{**TINY, "scope": "layerwise"}),
        tmp_path_factory.mktemp("lab"),
        data,
    )
    return {
        "sparse": (sown.sow(sown.dense(0), 1), sown.dense(0).weights, data),
        "imp": (trained.prune(dense, after, dense.weights, 1), dense.weights, data),
        "one_shot": (picked.pick(picked.dense(0), 1), picked.dense(0).weights, data),
    }


def possible(recipe, name):
    """Whether a recipe's tickets can have a branch."""
    try:
        branches.require(name, Spec(recipe=recipe))
    except UserError:
        return False
    return True


CONTROLS = [(r, name) for r in RECIPES for name in BRANCHES if possible(r, name)]


def test_every_branch_is_possible_somewhere():
    assert {name for _, name in CONTROLS} == set(BRANCHES)
    assert {recipe for recipe, _ in CONTROLS} == set(RECIPES)


@pytest.mark.parametrize("recipe, name", CONTROLS)
def test_branch_changes_something_repeats_and_stays_valid(recipe, name, pruned):
    own, *others = pruned[recipe]
    control, again = branch(own, name, *others), branch(own, name, *others)
    control.verify()
    changed = [
        n
        for part in ("mask", "weights")
        for n, a in getattr(own, part).items()
        if not np.array_equal(a, getattr(control, part)[n])
    ]
    order, *orders = (each.origin.get("order_seed") for each in (own, control, again))
    assert changed or order != orders[0] == orders[1]
    for part in ("mask", "weights"):
        for n, a in getattr(control, part).items():
            assert np.array_equal(a, getattr(again, part)[n])
    assert masks.kept(control.mask) == masks.kept(own.mask) == count(0.4, masks.size(own.mask))
    assert control.level == own.level and control.origin["arm"] == name
    assert own.origin["arm"] == "ticket" and control.spec == own.spec
    other = branch(
        dataclasses.replace(own, origin={**own.origin, "seed": 99}), name, *others
    )
    same = all(np.array_equal(a, other.weights[n]) for n, a in control.weights.items())
    same = same and orders[0] == other.origin.get("order_seed")
    assert same != BRANCHES.about(name).draws


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", METHODS)
def test_method_begins_and_ends_as_dense_as_its_scope_says(method, scope):
    spec = Spec(recipe="sparse", method=method, scope=scope, density=(0.3,), train_steps=1000)
    rng = np.random.default_rng(0)
    weights = {f"{n}/kernel": rng.normal(size=s) for n, s in {
        "a": (3, 3, 2, 6), "b": (3, 3, 6, 9), "c": (81, 20), "d": (20, 10)}.items()}  # fmt: skip
    shapes = {n: w.shape for n, w in weights.items()}
    dense = Ticket(masks.ones(shapes), weights, 0, 0, {"seed": 3, "replicate": 0}, spec)
    density = RECIPES["sparse"].levels(spec, shapes, {}).densities[1]
    ticket = growing.sown(dense, density, 1)
    ticket.verify()
    course = growing.course(spec)
    wanted = SCOPES[scope]({n: rng.random(s) for n, s in shapes.items()}, density)
    total = count(0.3, masks.size(dense.mask))
    if METHODS[method].falls:
        assert masks.density(ticket.mask) > 0.4
    else:
        assert masks.kept(ticket.mask) == total
    mover, mask = growing.mover(ticket, None), ticket.mask
    began = {n: int(m.sum()) for n, m in mask.items()}
    mover._initial = began
    for step in filter(course.due, range(spec.train_steps)):
        growth = {n: rng.random(s) for n, s in shapes.items()} if METHODS[method].grows else None
        size = {n: rng.random(s) for n, s in shapes.items()}
        mask = move(
            mask, size, growth, targets=mover.targets(step), fraction=course.fraction(step),
            pooled=METHODS[method].pooled,
        )  # fmt: skip
    assert masks.kept(mask) == total
    if scope != "global" and not METHODS[method].pooled:
        assert {n: int(m.sum()) for n, m in mask.items()} == {
            n: int(m.sum()) for n, m in wanted.items()
        }


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
