"""What is measured on the way: gradient flow, updates of masks, the Hessian's spectrum, FLOPs."""

import dataclasses

import numpy as np
import pytest

from lth_tf import datasets, experiments, masks, pruning, tickets
from lth_tf.analysis import comparison, summary
from lth_tf.callbacks.moving import flow
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.experiments import measured, spectrum
from lth_tf.models import plain_model
from lth_tf.models.small import matched, narrower
from lth_tf.report.comparison import comparison_table, flops_table
from lth_tf.spec import Spec, fields_of
from lth_tf.training import Interrupted, Trainer, feeds, states
from tests.test_dynamic import began
from tests.test_dynamic import spec as moving

DIGITS = datasets.load("digits")
SPEC = Spec(
    model="lenet_12_9", dataset="digits", validation_size=100, batch_size=20, train_steps=40,
    eval_every=10, learning_rate=0.01, precision="float64", distribute="none", compile="off",
    levels=1, checkpoint_every=0, measure=("gradient_flow",),
)  # fmt: skip


def spec(**changes):
    return dataclasses.replace(SPEC, **changes)


def by_tape(model, mask, step, seed, s):
    """The squared norm of the gradient over kept weights, of a batch in its order."""
    x, y = feeds.split(DIGITS, s.validation_size, s.seed)["train"]
    chosen = feeds.batch_indices(seed, step, 1, len(y), s.batch_size)[0]
    inputs = datasets.scaling.scaled(tf.constant(x[chosen]), DIGITS, s)
    kernels = pruning.kernels(model)
    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y[chosen], logits)
        loss = tf.reduce_mean(losses)
    gradients = tape.gradient(loss, list(kernels.values()))
    return sum(
        float(np.sum(g.numpy()[m != 0] ** 2))
        for g, m in zip(gradients, mask.values(), strict=True)
    )


def test_gradient_flow_is_what_a_tape_says_and_changes_no_bit():
    s, rng = spec(), np.random.default_rng(0)
    trainer, plain = Trainer(s, DIGITS), Trainer(spec(measure=()), DIGITS)
    weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
    mask = {n: (rng.random(v.shape) < 0.3).astype(np.uint8)
            for n, v in pruning.kernels(trainer.model).items()}  # fmt: skip
    weights = masks.apply(mask, weights)
    found = trainer.train(weights, mask, 0, 30, seed=4)
    assert [row["step"] for row in found.rows] == [0, 10, 20, 30]
    for row in found.rows:
        at = plain.train(weights, mask, 0, row["step"], seed=4)
        for column, step in zip(states.MEASURED, (row["step"], 0), strict=True):
            expected = by_tape(plain.model, mask, step, 4, s)
            assert row[column] == pytest.approx(expected, rel=1e-9)
    assert all(w.tobytes() == at.weights[n].tobytes() for n, w in found.weights.items())
    others = [{n: v for n, v in row.items() if n not in states.MEASURED} for row in found.rows]
    drop = [{n: v for n, v in row.items() if n != "seconds"} for row in others]
    assert drop == [{n: v for n, v in row.items() if n != "seconds"} for row in at.rows]


def test_flow_counts_kept_weights_alone():
    gradients = {"a": np.array([[1.0, 2.0]]), "b": np.array([3.0, -4.0])}
    assert flow(gradients, {"a": np.array([[0, 1]]), "b": np.array([1, 1])}) == 4 + 25


@pytest.mark.parametrize("execution", [Execution("sparse"), Execution(compact="on")])
def test_every_engine_tells_the_same_flow(execution):
    if execution.engine:
        pytest.importorskip("numba")
    trainer = Trainer(spec(), DIGITS)
    weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
    rng = np.random.default_rng(1)
    mask = {n: (rng.random(v.shape) < 0.2).astype(np.uint8)
            for n, v in pruning.kernels(trainer.model).items()}  # fmt: skip
    weights = masks.apply(mask, weights)
    here = trainer.train(weights, mask, 0, 20).rows
    there = Trainer(spec(), DIGITS, execution=execution).train(weights, mask, 0, 20).rows
    for row, other in zip(here, there, strict=True):
        for name in states.MEASURED:
            assert row[name] == pytest.approx(other[name], rel=1e-7)


def test_statistics_are_not_moved_by_looking(thin_norm):
    found = []
    for measure in ((), ("gradient_flow",)):
        trainer = Trainer(spec(model=thin_norm, measure=measure), DIGITS)
        weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
        mask = masks.ones({n: v.shape for n, v in pruning.kernels(trainer.model).items()})
        found.append(trainer.train(weights, mask, 0, 10).weights)
    assert all(w.tobytes() == found[1][n].tobytes() for n, w in found[0].items())


# --- Updates of masks ---


def test_each_update_tells_what_it_changed_and_a_resumed_training_all_of_them(tmp_path):
    s = moving(measure=("gradient_flow",))
    trainer, ticket, mover = began(s)
    whole = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover)
    steps = [5, 10, 15, 20, 25, 30]
    assert [row["step"] for row in whole.updates] == steps
    explored = [row["explored"] for row in whole.updates]
    assert explored == sorted(explored) and explored[-1] == mover.explored
    assert all(row["density"] == masks.density(ticket.mask) for row in whole.updates)
    # Where an evaluation falls on an update, both look at the same batch.
    flows = {row["step"]: row["gradient_flow"] for row in whole.rows}
    for row in whole.updates:
        if row["step"] in flows:
            assert row["gradient_flow_before"] == flows[row["step"]]
        # What is grown by gradient raises the flow.
        more = row["gradient_flow_after"] - row["gradient_flow_before"]
        assert more > 0 if row["changed"] else more == 0
    new = sum(row["changed"] for row in whole.updates)
    gained = sum(int(m.sum()) for m in mover.ever.values())
    gained -= sum(int(m.sum()) for m in ticket.mask.values())
    assert 0 < gained <= new

    kept, again = [], iter([False] * 2 + [True] * 99)
    trainer._pace = 4
    with pytest.raises(Interrupted):
        trainer.train(
            ticket.weights, ticket.mask, 0, 40, mover=began(s)[2], keep=kept.append,
            asked=lambda: next(again),
        )  # fmt: skip
    trainer, _, fresh = began(s)
    resumed = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=fresh, state=kept[0])
    assert resumed.updates == whole.updates
    measured.write_updates(tmp_path, whole.updates)
    assert measured.read(tmp_path, measured.UPDATES) == whole.updates
    measured.clear(tmp_path)
    assert measured.read(tmp_path, measured.UPDATES) == []


def test_updates_tell_the_density_that_falls_and_no_flow_unasked():
    trainer, ticket, mover = began(moving(method="gmp"))
    found = trainer.train(ticket.weights, ticket.mask, 0, 40, mover=mover).updates
    densities = [row["density"] for row in found]
    assert densities == sorted(densities, reverse=True) and densities[0] > 0.9 > densities[-1]
    assert all(row["changed"] == row["fraction"] == 0 for row in found)
    assert "gradient_flow_before" not in found[0]


# --- The Hessian's largest eigenvalues ---


@pytest.mark.parametrize("size", [3, 20, 60])
def test_lanczos_finds_the_largest_eigenvalues_over_kept_weights(size):
    rng = np.random.default_rng(size)
    matrix = rng.normal(size=(2 * size, 2 * size))
    matrix += matrix.T
    mask = {"a": np.array([1, 0] * (size // 2) + [1] * (size % 2)), "b": None}
    mask["b"] = np.concatenate([np.ones(size - int(mask["a"].sum())), np.zeros(size // 2 + 1)])
    mask["b"] = mask["b"][: 2 * size - len(mask["a"])]
    kept = np.concatenate(list(mask.values())) != 0

    def product(vector):
        flat = np.concatenate(list(vector.values()))
        assert not flat[~kept].any()
        return dict(zip(mask, np.split(matrix @ flat, [len(mask["a"])]), strict=True))

    matrix = matrix[: len(kept), : len(kept)]
    found = spectrum.largest(product, mask, seed=1)
    expected = np.linalg.eigvalsh(matrix[np.ix_(kept, kept)])[::-1][:10]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_an_experiment_writes_eigenvalues_of_the_loss_at_the_steps_asked_for(tmp_path):
    s = moving(
        density=(0.05,), model="lenet_5", train_steps=20, update_every=5, hessian_at=(0, 10, 20),
        measure=("gradient_flow",), precision="float32",
    )  # fmt: skip
    experiments.run(s, tmp_path, DIGITS)
    folder = tmp_path / "replicate_00" / "level_01"
    rows = measured.read(folder, measured.HESSIAN)
    assert [row["step"] for row in rows] == [0] * 10 + [10] * 10 + [20] * 10
    assert [row["rank"] for row in rows[:10]] == list(range(1, 11))

    # At the end, against the whole matrix by automatic differentiation.
    ticket = tickets.load_ticket(folder / "ticket.safetensors")
    ends = tickets.solution(folder / "trained.safetensors", ticket)
    x, y = feeds.split(DIGITS, s.validation_size, s.seed)["train"]
    rng = np.random.default_rng([ticket.origin["seed"], spectrum._DRAWN])
    chosen = rng.permutation(len(y))[: spectrum.EXAMPLES]
    x = np.reshape(datasets.scaling.scaled(x[chosen], DIGITS, s), (len(chosen), -1))
    w = {n: v.astype(np.float64) for n, v in ends.weights.items()}
    kept = [np.flatnonzero(m) for m in ends.mask.values()]
    first = tf.Variable(np.ravel(w["fc1/kernel"])[kept[0]])
    last = tf.Variable(np.ravel(w["output/kernel"])[kept[1]])
    with tf.GradientTape(persistent=True) as outer:
        flat = tf.concat([first, last], 0)
        outer.watch(flat)
        with tf.GradientTape() as tape:
            tape.watch(flat)
            parts = tf.split(flat, [len(kept[0]), len(kept[1])])
            kernels = [
                tf.reshape(tf.scatter_nd(at[:, None], part, [m.size]), m.shape)
                for at, part, m in zip(kept, parts, ends.mask.values(), strict=True)
            ]
            hidden = tf.nn.relu(x.astype(np.float64) @ kernels[0] + w["fc1/bias"])
            logits = hidden @ kernels[1] + w["output/bias"]
            labels = tf.constant(y[chosen])
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(losses)
        gradient = tape.gradient(loss, flat)
    matrix = outer.jacobian(gradient, flat, experimental_use_pfor=False).numpy()
    expected = np.linalg.eigvalsh(matrix)[::-1][:10]
    found = [row["eigenvalue"] for row in rows if row["step"] == 20]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6 * expected[0])

    # All of it is in TensorBoard's logs, too.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert {
        "gradient_flow", "gradient_flow_fixed", "hessian/eigenvalue_1", "mask/explored",
        "mask/changed", "mask/gradient_flow_before", "mask/gradient_flow_after",
    } <= {*events.Tags()["tensors"], *events.Tags()["scalars"]}  # fmt: skip


def test_live_logs_have_updates_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    s = moving(train_steps=10, update_every=3)
    experiments.run(s, tmp_path, DIGITS, execution=Execution(live=True))
    events = EventAccumulator(str(tmp_path / "replicate_00/level_01/tensorboard"))
    events.Reload()
    tags = {*events.Tags()["tensors"], *events.Tags()["scalars"]}
    assert {"mask/explored", "mask/changed", "validation_loss"} <= tags


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UserError, match="unknown measure 'flow'; there are: gradient_flow"):
        spec(measure=("flow",))
    with pytest.raises(UserError, match=r"hessian_at \[50\] lie behind the end of training"):
        spec(hessian_at=(3, 50)).require_effect()


def test_a_training_that_goes_on_may_be_measured_otherwise(tmp_path):
    s, kept, again = spec(measure=()), [], iter([False] * 2 + [True] * 99)
    trainer = Trainer(s, DIGITS)
    weights = {n: v.numpy() for n, v in pruning.weights(trainer.model).items()}
    mask = masks.ones({n: v.shape for n, v in pruning.kernels(trainer.model).items()})
    trainer._pace = 8
    with pytest.raises(Interrupted):
        trainer.train(
            weights, mask, 0, 40, keep=kept.append, asked=lambda: next(again)
        )  # fmt: skip
    found = Trainer(spec(), DIGITS).train(weights, mask, 0, 40, state=kept[0]).rows
    known = [row["gradient_flow"] is not None for row in found]
    assert known[0] is False and known[-1] is True
    summary.write_metrics(tmp_path / "metrics.csv", "accuracy", found)
    assert summary.read_metrics(tmp_path / "metrics.csv")[0] == found


# --- FLOPs in tables ---


def test_flops_are_in_the_plan_in_the_summary_and_beside_accuracy(tmp_path):
    rigl = moving(density=(0.512, 0.2), dense=True)
    plan = experiments.plan(rigl, (8, 8, 1), 10)
    rows = experiments.run(rigl, tmp_path / "rigl", DIGITS)
    assert rows[0]["inference_flops"] == rows[0]["training_flops"] == 1
    assert {name: rows[2][name] for name in summary.FLOPS} == plan.flops
    # Six updates among 40 steps.
    f = rows[2]["inference_flops"]
    assert f == pytest.approx(0.2, abs=0.005)
    assert rows[2]["training_flops"] == pytest.approx((34 * 3 * f + 6 * (2 * f + 1)) / 120)
    assert summary.read_summary(tmp_path / "rigl") == rows

    shared = {n: getattr(rigl, n) for n in SPEC.as_dict() if hasattr(rigl, n)}
    only = {n for r in ("sparse", "one_shot") for n in experiments.running.RECIPES[r].fields}
    imp = Spec(**{n: v for n, v in shared.items() if n not in only | {"recipe"}})
    imp = dataclasses.replace(imp, recipe="imp", levels=3, scope="global")
    experiments.run(imp, tmp_path / "imp", DIGITS)
    found = comparison.compare([(tmp_path / "rigl", rigl), (tmp_path / "imp", imp)])
    assert list(found.methods) == ["rigl (update_every 5)", "imp"]
    (point,) = [p for p in found.methods["imp"] if p.level == 3]
    own = [p.flops["training_flops"] for p in found.methods["imp"]]
    assert point.flops["total_flops"] == pytest.approx(1 + sum(own))
    table = flops_table(found)
    assert table.row_count == 3 and list(table.columns[1].cells)[0] == "dense"
    columns = comparison.rows(found)[0].keys()
    assert {*summary.FLOPS, "total_flops"} <= set(columns)


def test_a_summary_of_before_flops_were_counted_is_read_and_goes_on(tmp_path):
    row = summary.summary_row("ticket", 0, 0, 1.0, [
        {"step": s, "loss": 1.0, "validation_loss": 1.0, "validation_accuracy": 1.0,
         "test_loss": 1.0, "test_accuracy": 1.0, "learning_rate": 1.0, "seconds": 1.0}
        for s in (0, 9)
    ])  # fmt: skip
    summary.write_summary(tmp_path, [row])
    assert "flops" not in (tmp_path / "summary.csv").read_text()
    assert summary.read_summary(tmp_path) == [row]
    more = {**row, "level": 1, "inference_flops": 0.5, "training_flops": 0.25}
    summary.write_summary(tmp_path, [row, more])
    assert summary.read_summary(tmp_path) == [row, more]
    assert flops_table(comparison.Comparison(Spec(), None, {}, [])) is None


# --- Small dense networks ---


@pytest.mark.parametrize(
    ("name", "density"),
    [
        ("lenet_300_100", 0.02), ("lenet5_classic", 0.05), ("lenet5", 0.01),
        pytest.param("resnet20", 0.2, marks=pytest.mark.slow),
    ],  # fmt: skip
)
def test_a_small_dense_network_has_as_many_weights(name, density):
    s = Spec(model=name)
    shape = (32, 32, 3) if "resnet" in name else (28, 28, 1)
    one = matched(s, shape, 10, density)
    sizes = [
        sum(int(np.prod(v.shape)) for v in pruning.kernels(plain_model(x, shape, 10, 0)).values())
        for x in (one, s)
    ]
    assert sizes[0] / sizes[1] == pytest.approx(density, rel=0.04)
    changed = {n for n, v in one.as_dict().items() if v != s.as_dict()[n]}
    assert changed == ({"width"} if "resnet" in name else {"model"})


def test_models_of_one_size_and_shares_that_are_none_are_refused():
    with pytest.raises(UserError, match="'conv2' comes in one size"):
        matched(Spec(model="conv2"), (32, 32, 3), 10, 0.5)
    with pytest.raises(UserError, match="small_dense 1 is out of range"):
        matched(Spec(), (28, 28, 1), 10, 1.0)
    assert narrower(Spec(model="lenet5"), 0.1).model == "lenet5_2_5_50"


def test_a_small_dense_network_stands_beside_methods(tmp_path):
    s = moving(density=(0.3,), train_steps=10, update_every=3)
    experiments.run(s, tmp_path / "rigl", DIGITS)
    shared = {n: getattr(s, n) for n in fields_of(role="training")}
    dense = Spec(**shared, levels=0)
    dense = dataclasses.replace(dense, model="lenet_4_3")
    experiments.run(dense, tmp_path / "small", DIGITS)
    pairs = [(tmp_path / "rigl", s)], [(tmp_path / "small", dense)]
    found = comparison.compare(*pairs)
    (point,) = found.small.values()
    share = (64 * 4 + 4 * 3 + 3 * 10) / (64 * 12 + 12 * 9 + 9 * 10)
    assert point.density == pytest.approx(share)
    assert point.flops["inference_flops"] == pytest.approx(share)
    assert list(found.small) == ["small dense (lenet_4_3)"]
    assert "small dense (lenet_4_3)" in [*comparison_table(found).columns[0].cells]
    assert "small dense (lenet_4_3)" in [*flops_table(found).columns[1].cells]
    other = dataclasses.replace(dense, train_steps=9)
    with pytest.raises(UserError, match="differ in train_steps"):
        comparison.compare(pairs[0], [(tmp_path / "small", other)])
