"""Sparse training: masks that move, against the papers' algorithms written out by hand."""

import dataclasses
import math

import numpy as np
import pytest

from lth_tf import datasets, experiments, masks, pruning, tickets
from lth_tf.compat import keras, tf
from lth_tf.dynamic import FRACTIONS, METHODS, Course, move
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.experiments import growing
from lth_tf.pruning.slots import slots_for
from lth_tf.recipes import sparse
from lth_tf.spec import Spec
from lth_tf.training import Interrupted, Trainer
from lth_tf.training.graph import Graph

DIGITS = datasets.load("digits")
SPEC = Spec(
    recipe="sparse", method="rigl", scope="erk", density=(0.2,), model="lenet_12_9",
    dataset="digits", validation_size=100, batch_size=20, train_steps=40, eval_every=10,
    update_every=5, learning_rate=0.01, precision="float64", distribute="none", compile="off",
    checkpoint_every=0,
)  # fmt: skip


def spec(**changes):
    changes = {"method": "rigl", **changes}
    if changes["method"] == "static":
        changes = {"update_every": 100, **changes}
    return dataclasses.replace(SPEC, **changes)


# --- The update ---


def by_hand(mask, weights, growth, target, fraction):
    """Evci et al. 2020, algorithm 1, on one kernel, one weight after the other."""
    m, w, g = (np.ravel(a).tolist() for a in (mask, weights, growth))
    k = math.floor(fraction * target + 1e-9)
    kept = [i for i in range(len(m)) if m[i]]
    kept.sort(key=lambda i: (-abs(w[i]), i))
    stay = set(kept[: target - k])
    others = [i for i in range(len(m)) if i not in stay]
    others.sort(key=lambda i: (-g[i], i))
    new = stay | set(others[:k])
    return np.array([i in new for i in range(len(m))]).reshape(np.shape(mask)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(40))
def test_an_update_is_the_papers_entry_by_entry_with_ties(seed):
    rng = np.random.default_rng(seed)
    shapes = {"a": (4, 6), "b": (3, 3, 2, 5), "c": (7,)}
    mask = {n: (rng.random(s) < 0.6).astype(np.uint8) for n, s in shapes.items()}
    weights = {n: rng.integers(-3, 4, s).astype(float) * mask[n] for n, s in shapes.items()}
    growth = {n: rng.integers(0, 4, s).astype(float) for n, s in shapes.items()}
    less = {n: int(rng.integers(0, 3)) for n in shapes}
    targets = {n: max(1, int(m.sum()) - less[n]) for n, m in mask.items()}
    fraction = float(rng.choice([0, 0.1, 0.3, 0.5, 0.99]))
    found = move(mask, weights, growth, targets=targets, fraction=fraction)
    for n in shapes:
        assert np.array_equal(
            found[n], by_hand(mask[n], weights[n], growth[n], targets[n], fraction)
        )
        assert found[n].sum() == targets[n]
    alone = move(mask, weights, None, targets=targets, fraction=fraction)
    for n in shapes:
        assert np.array_equal(alone[n], by_hand(mask[n], weights[n], growth[n], targets[n], 0))


def test_a_pooled_update_drops_from_all_kernels_and_grows_in_each():
    mask = {"a": np.ones(4, np.uint8), "b": np.ones(4, np.uint8)}
    weights = {"a": np.array([9.0, 8, 7, 6]), "b": np.array([1.0, 2, 3, 5])}
    growth = {n: np.arange(4.0) for n in mask}
    alone = move(mask, weights, None, targets={"a": 3, "b": 2}, pooled=True)
    assert alone["a"].tolist() == [1, 1, 1, 1] and alone["b"].tolist() == [0, 0, 0, 1]
    found = move(mask, weights, growth, targets={"a": 3, "b": 2}, fraction=0.25, pooled=True)
    # Of a's four one is replaced, by the one of the highest score that is not there: itself.
    assert found["a"].tolist() == [1, 1, 1, 1] and found["b"].tolist() == [0, 0, 0, 1]


def test_when_and_by_how_much():
    rigl = Course("rigl", 100, 750)
    assert [s for s in range(1000) if rigl.due(s)] == [100, 200, 300, 400, 500, 600, 700]
    assert rigl.next(101) == 200 and rigl.next(701) is None and rigl.updates == 7
    assert Course("rigl", 100, 700).last == 600  # t < T_end
    assert rigl.fraction(0) == pytest.approx(0.3) and rigl.fraction(375) == pytest.approx(0.15)
    assert rigl.density(300, 10, 10) == 10
    gmp = Course("gmp", 10, 70, 20)
    assert [s for s in range(100) if gmp.due(s)] == [20, 30, 40, 50, 60, 70]
    assert gmp.fraction(30) == 0
    assert gmp.density(20, 1, 0.2) == 1 and gmp.density(70, 1, 0.2) == pytest.approx(0.2)
    assert gmp.density(50, 1, 0.2) == pytest.approx(0.2 + 0.8 * 0.4**3)
    for name, at in (("constant", 0.3), ("linear", 0.15), ("inverse_power", 0.0375)):
        assert Course("set", 10, 100, 0, 0.3, name).fraction(50) == pytest.approx(at)
    assert Course("set", 10, 100, 0, 0.3, "learning_rate").fraction(50, 0.1) == pytest.approx(0.03)
    assert set(FRACTIONS) >= {"cosine", "constant", "linear", "inverse_power", "learning_rate"}
    assert not any(Course("static").due(s) for s in range(100))


def test_falling_densities_are_those_of_polynomial_decay():
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule

    schedule = pruning_schedule.PolynomialDecay(0.0, 0.8, 20, 70, frequency=10)
    gmp = Course("gmp", 10, 70, 20)
    for step in range(100):
        updates, sparsity = schedule(tf.constant(step, tf.int64))
        assert bool(updates) == gmp.due(step)
        if updates:
            assert 1 - gmp.density(step, 1.0, 0.2) == pytest.approx(float(sparsity), abs=1e-6)


@pytest.mark.parametrize("constant", [False, True])
def test_masks_are_tfmots_on_the_same_weights(constant):
    from tensorflow_model_optimization.python.core.sparsity.keras import (
        pruning_impl,
        pruning_schedule,
    )

    rng = np.random.default_rng(0)
    kernel = tf.Variable(rng.normal(size=(10, 15)).astype(np.float32))
    if constant:  # from one update on as sparse as it ends
        schedule = pruning_schedule.ConstantSparsity(0.8, 20, 70, 10)
        gmp = Course("gmp", 10, 20, 20)
    else:
        schedule = pruning_schedule.PolynomialDecay(0.0, 0.8, 20, 70, frequency=10)
        gmp = Course("gmp", 10, 70, 20)
    mask = {"": np.ones((10, 15), np.uint8)}
    for step in filter(gmp.due, range(100)):
        held = kernel, tf.Variable(tf.ones_like(kernel)), tf.Variable(0.0)
        theirs = pruning_impl.Pruning(
            lambda step=step: tf.constant(step, tf.int64), [held], schedule, (1, 1), "AVG"
        )
        _, wanted = theirs._update_mask(kernel)
        targets = {"": round(gmp.density(step, 150, 30))}
        mask = move(mask, {"": kernel.numpy()}, None, targets=targets)
        assert np.array_equal(mask[""], wanted.numpy())
        kernel.assign(np.where(mask[""], kernel.numpy() * rng.uniform(0.5, 2, (10, 15)), 0))
    assert mask[""].sum() == 30


# --- In a training ---


class Watcher(keras.callbacks.Callback):
    """Remembers masks, and checks the invariant, after each step."""

    def __init__(self, trainer):
        super().__init__()
        self.trainer, self.masks = trainer, {}

    def next_boundary(self, step):
        return step + 1

    def on_train_batch_end(self, batch, logs=None):
        pruning.check(self.model, self.trainer.optimizer)
        self.masks[batch] = pruning.get_mask(self.model)


def began(s, level=1, inputs=((8, 8, 1), 10)):
    """A trainer, a ticket and its mover."""
    trainer = Trainer(s, DIGITS)
    weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
    shapes = {n: tuple(v.shape) for n, v in pruning.kernels(trainer.model).items()}
    shape, classes = inputs
    origin = {"seed": 3, "replicate": 0, "arm": "ticket"}
    origin |= {"input_shape": list(shape), "classes": classes}
    dense = tickets.Ticket(masks.ones(shapes), weights, 0, 0, origin, s)
    density = sparse.levels(s, shapes, {}).densities[level]
    ticket = growing.sown(dense, density, level)
    from lth_tf.models import Blueprint

    mover = growing.mover(ticket, Blueprint(s, shape, classes)) if METHODS[s.method].moves else None
    return trainer, ticket, mover


@pytest.mark.parametrize("method", list(METHODS))
def test_masks_move_when_they_are_to_and_stay_as_dense_as_they_are_to_be(method):
    s = spec(method=method)
    trainer, ticket, mover = began(s)
    watcher = Watcher(trainer)
    trained = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover, callbacks=[watcher])
    course, before = sparse.course(s), ticket.mask
    for step, mask in watcher.masks.items():
        changed = any((mask[n] != before[n]).any() for n in mask)
        assert changed <= course.due(step)
        if course.due(step) and method != "granet":
            assert {n: int(m.sum()) for n, m in mask.items()} == mover.targets(step)
        if course.due(step):
            assert sum(int(m.sum()) for m in mask.values()) == sum(mover.targets(step).values())
        before = mask
    assert trained.mask.keys() == ticket.mask.keys()
    assert masks.density(trained.mask) == pytest.approx(0.2, abs=0.005)
    if method not in ("static", "gmp"):
        assert any((trained.mask[n] != m).any() for n, m in ticket.mask.items())
        assert masks.density(trained.mask) < mover.explored <= 1


def test_rigl_grows_by_the_dense_gradient_of_its_steps_batch():
    s = spec(optimizer="momentum")
    trainer, ticket, mover = began(s)
    at, kept = {}, []

    class Looker(keras.callbacks.Callback):
        def next_boundary(self, step):
            return next(b for b in (5, 6, 40) if b > step)

        def on_train_batch_end(self, batch, logs=None):
            weights = {n: v.numpy() for n, v in pruning.weights(self.model).items()}
            slots = {
                n: slots_for(trainer.optimizer, v)[0].numpy()
                for n, v in pruning.kernels(self.model).items()
            }
            at[batch + 1] = weights, slots, pruning.get_mask(self.model), logs["loss"]
            kept.append(int(trainer.optimizer.iterations))

    trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover, callbacks=[Looker()])
    weights, slots, mask, _ = at[5]
    after, slots_after, new, _ = at[6]
    # The same gradient, of the plain model, from the batch of step 5.
    plain = pruning.strip(trainer.model)
    pruning.assign(plain, weights)
    feed = trainer.feed
    x, y = feed.batch(feed.take(feed.begin(5, 6, 0), 0), tf.constant(0, tf.uint64), tf.constant(5))
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(trainer.task.losses(y, plain(x, training=True)))
    kernels = pruning.kernels(plain)
    gradients = dict(zip(kernels, tape.gradient(loss, list(kernels.values())), strict=True))
    fraction = 0.3 * (1 + math.cos(math.pi * 5 / round(0.78125 * 40))) / 2
    assert kept[:2] == [5, 6]  # the learning rate goes on
    for n, m in mask.items():
        g = np.abs(gradients[n].numpy())
        assert np.array_equal(new[n], by_hand(m, weights[n], g, int(m.sum()), fraction))
        born = (new[n] != 0) & (m == 0)
        stayed = (new[n] != 0) & (m != 0)
        assert np.array_equal(after[n][stayed], weights[n][stayed])  # that step does not train
        assert np.array_equal(slots_after[n][stayed], slots[n][stayed])
        assert not after[n][born].any() and not slots_after[n][born].any()
    assert any(((new[n] != 0) & (m == 0)).any() for n, m in mask.items())
    assert all(np.array_equal(after[n], w) for n, w in weights.items() if n not in mask)


def test_snfs_averages_the_dense_gradient_of_every_step():
    s = spec(method="snfs", optimizer="sgd", learning_rate=0.1, train_steps=8, update_every=6,
             update_until=7, eval_every=8)  # fmt: skip
    trainer, ticket, mover = began(s)
    trainer.train(ticket.weights, ticket.mask, 0, 8, mover=mover)
    plain = Trainer(dataclasses.replace(s, method="static", update_every=100, update_until=0.78125),
                    DIGITS)  # fmt: skip
    # The static training of the same mask, step by step, with the plain model's gradients.
    average = {n: np.zeros(m.shape) for n, m in ticket.mask.items()}
    values = dict(ticket.weights)
    network = pruning.strip(plain.model)
    feed = plain.feed
    for step in range(7):
        pruning.assign(network, values)
        x, y = feed.batch(
            feed.take(feed.begin(step, step + 1, 0), 0), tf.constant(0, tf.uint64),
            tf.constant(step),
        )  # fmt: skip
        variables = pruning.weights(network)
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(plain.task.losses(y, network(x, training=True)))
        for n, g in zip(variables, tape.gradient(loss, list(variables.values())), strict=True):
            if n in average:
                average[n] = 0.9 * average[n] + 0.1 * g.numpy()
                values[n] = values[n] - 0.1 * g.numpy() * ticket.mask[n]
            else:
                values[n] = values[n] - 0.1 * g.numpy()
    fraction = mover.course.fraction(6)
    for n, m in ticket.mask.items():
        want = by_hand(m, values[n], np.abs(average[n]), int(m.sum()), fraction)
        assert np.array_equal(pruning.get_mask(trainer.model)[n], want)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "set"},
        {"method": "snfs", "optimizer": "momentum"},
        {"method": "granet", "model": "conv2", "update_trains": True, "grow_batch": "held_out"},
        {"method": "rigl", "grow_init": "random", "regrown": "new", "compile": "on"},
        {"method": "gmp", "update_from": 10},
    ],
)
def test_a_training_is_resumed_bit_for_bit(changes):
    s = spec(**changes)
    trainer, ticket, mover = began(s)
    whole = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover)
    kept, again = [], iter([False] * 2 + [True] * 99)
    _, _, other = began(s)
    trainer._pace = 4
    with pytest.raises(Interrupted):
        trainer.train(
            ticket.weights, ticket.mask, 0, 40, mover=other, keep=kept.append,
            asked=lambda: next(again),
        )  # fmt: skip
    assert 5 < kept[0].step < 35
    trainer, _, fresh = began(s)
    resumed = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=fresh, state=kept[0])
    for name, w in whole.weights.items():
        assert w.tobytes() == resumed.weights[name].tobytes()
    assert all(np.array_equal(m, resumed.mask[n]) for n, m in whole.mask.items())
    assert fresh.explored == mover.explored


def test_gradients_of_pruned_weights_are_not_packed():
    with pytest.raises(UserError, match="communication=packed adds up .* snfs needs all of them"):
        s = spec(method="snfs", communication="packed", distribute="mirrored", devices=2)
        Trainer(s, DIGITS)


@pytest.mark.slow
def test_averages_of_gradients_are_those_of_all_replicas():
    found = {}
    for many in (1, 2):
        several = {"distribute": "mirrored", "devices": 2} if many > 1 else {}
        s = spec(method="snfs", **several)
        trainer, ticket, mover = began(s)
        found[many] = trainer.train(ticket.weights, ticket.mask, 0, 20, mover=mover).mask
    assert all(np.array_equal(m, found[2][n]) for n, m in found[1].items())


def test_replicas_move_the_same_entries():
    found = {}
    for many in (1, 2, 4):
        s = spec(distribute="mirrored", devices=many) if many > 1 else spec()
        trainer, ticket, mover = began(s)
        found[many] = trainer.train(ticket.weights, ticket.mask, 0, 20, mover=mover).mask
    for many in (2, 4):
        assert all(np.array_equal(m, found[many][n]) for n, m in found[1].items())


def test_the_sparse_engine_follows_a_moving_mask():
    pytest.importorskip("numba")
    found = []
    for engine in ("tensorflow", "sparse"):
        _, ticket, mover = began(spec())
        trainer = Trainer(spec(), DIGITS, execution=Execution(engine))
        found.append(trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover))
    assert [each.decision.engine for each in found] == ["tensorflow", "sparse"]
    assert all(np.array_equal(m, found[1].mask[n]) for n, m in found[0].mask.items())
    assert all(np.abs(w - found[1].weights[n]).max() < 1e-10 for n, w in found[0].weights.items())


def test_the_sparse_engine_knows_no_gradient_of_pruned_weights_at_every_step():
    pytest.importorskip("numba")
    s = spec(method="snfs")
    with pytest.raises(UserError, match="snfs needs the gradient of pruned weights at every step"):
        Trainer(s, DIGITS, execution=Execution("sparse"))
    trainer = Trainer(s, DIGITS, execution=Execution("auto"))
    assert trainer.engines.choose(began(s)[1].mask, 10).engine == "tensorflow"


def test_no_network_is_built_for_a_mask_that_moves():
    with pytest.raises(UserError, match="compact_training=on does not work here: masks move"):
        Trainer(spec(), DIGITS, execution=Execution(compact="on"))
    assert "masks move" in Trainer(spec(), DIGITS).engines.told()


def test_a_gradient_of_pruned_weights_leaves_statistics_and_counts(thin_norm):
    s = spec(model=thin_norm)
    trainer, ticket, mover = began(s)
    trainer.train(ticket.weights, ticket.mask, 0, 1)
    graph = Graph(trainer.setup)
    graph.begin(ticket.mask)
    mover.begin(trainer.model, trainer.optimizer, ticket.mask, graph)
    before = {n: v.numpy() for n, v in pruning.weights(trainer.model).items() if not v.trainable}
    mover.update(5, 0)
    after = pruning.weights(trainer.model)
    assert before and all(np.array_equal(v, after[n].numpy()) for n, v in before.items())


# --- In an experiment ---


def test_an_experiment_tells_the_mask_that_it_ends_with(tmp_path):
    s = spec(method="gmp", density=(0.3, 0.1), replicates=2, dense=True)
    rows = experiments.run(s, tmp_path, DIGITS)
    assert len(rows) == 6
    for replicate in range(2):
        for level, density in ((1, 0.3), (2, 0.1)):
            folder = tmp_path / f"replicate_{replicate:02d}" / f"level_{level:02d}"
            ticket = tickets.load_ticket(folder / "ticket.safetensors")
            ends = tickets.solution(folder / "trained.safetensors", ticket)
            assert ticket.density == 1 and ends.density == pytest.approx(density, abs=0.005)
            ends.verify()
            (row,) = [r for r in rows if (r["replicate"], r["level"]) == (replicate, level)]
            assert row["density"] == ends.density
            # What it was while it was denser does not count.
            assert row["early_stop_step"] > sparse.course(s).last
    again = experiments.run(s, tmp_path, DIGITS)
    assert again == rows


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"update_every": 40}, "update_every 40 is no less than train_steps 40"),
        ({"update_every": 35}, "the mask would never be updated"),
        ({"update_until": 50}, "update_until 50 lies behind the end of training"),
        ({"update_until": 5.5}, "neither a whole step nor a fraction"),
        ({"method": "set", "grow_batch": "held_out"}, "grow_batch held_out has no meaning for"),
        ({"method": "gmp", "drop_fraction": 0.5}, "drop_fraction 0.5 has no meaning for"),
        ({"initial_density": 0.5}, "initial_density 0.5 has no meaning for --method=rigl, only"),
        ({"method": "granet", "initial_density": 0.1}, "density 0.2 is not below initial_density"),
        ({"method": "static", "update_every": 7}, "update_every 7 has no meaning for"),
        ({"density": (1.0,)}, "out of range|removes none"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        experiments.run(spec(**changes), tmp_path, DIGITS)
    with pytest.raises(UserError, match="drop_fraction 1.0 is out of range"):
        spec(drop_fraction=1.0)
    with pytest.raises(UserError, match="has no meaning for the recipe 'imp'"):
        Spec(update_every=7)
