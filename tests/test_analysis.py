"""analysis: the early-stop step, tables that keep every digit, and when a ticket wins."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from lth_tf import analysis, masks, pruning
from lth_tf.analysis import comparison
from lth_tf.analysis.summary import columns, read_csv, write_csv
from lth_tf.compat import keras
from lth_tf.errors import UserError
from lth_tf.models import MODELS
from lth_tf.spec import Spec

COLUMNS = columns()

METRICS = [
    {"step": 100, "validation_loss": 0.5, "test_accuracy": 0.90, "seconds": 0.1},
    {"step": 200, "validation_loss": 0.3, "test_accuracy": 0.95, "seconds": 1.0},
    {"step": 300, "validation_loss": 0.3, "test_accuracy": None, "seconds": 2.0},
    {"step": 400, "validation_loss": 0.4, "test_accuracy": 0.97, "seconds": 3.5},
]


# Summaries.


def test_early_stop_is_the_first_of_equals():
    assert analysis.early_stop(METRICS) is METRICS[1]
    assert analysis.early_stop(METRICS[2:]) is METRICS[2]
    assert analysis.early_stop(METRICS[:1]) is METRICS[0]


def test_summary_row():
    assert analysis.summary_row("reinit", 2, 3, 0.512, METRICS) == {
        "arm": "reinit",
        "replicate": 2,
        "level": 3,
        "density": 0.512,
        "early_stop_step": 200,
        "validation_loss_min": 0.3,
        "test_accuracy_early": 0.95,
        "test_accuracy_end": 0.97,
        "steps": 300,
        "seconds": 3.5,
    }
    assert tuple(analysis.summary_row("ticket", 0, 0, 1.0, METRICS)) == COLUMNS


def test_csv_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"arm": 'a, "b"\nc', "n": int(rng.integers(10**9)), "x": float(x), "none": None}
        for x in rng.normal(size=200) * 10.0 ** rng.integers(-300, 300, 200)
    ]
    rows += [
        {"arm": "reinit", "n": -1, "x": x, "none": None}
        for x in (0.1, 1 / 3, 1.0, 1e22, 5e-324, np.float64(0.1), -0.0, float("inf"))
    ]
    write_csv(tmp_path / "x.csv", ("arm", "n", "x", "none"), rows)
    back = read_csv(tmp_path / "x.csv")
    assert back == rows
    assert all(type(b["n"]) is int and type(b["x"]) is float for b in back)
    assert np.signbit(back[-2]["x"])
    assert read_csv(tmp_path / "x.csv") == back


def test_csv_is_plain(tmp_path):
    write_csv(tmp_path / "x.csv", ("a", "b"), [{"a": 0.1, "b": None}, {"a": 2, "b": "x"}])
    assert (tmp_path / "x.csv").read_bytes() == b"a,b\n0.1,\n2,x\n"
    with pytest.raises(ValueError, match="'c'"):
        write_csv(tmp_path / "x.csv", ("a", "b"), [{"c": 1}])


def test_summary_files(tmp_path):
    order = [
        (1, 0, "ticket"),
        (0, 1, "shuffle"),
        (0, 1, "ticket"),
        (0, 1, "reinit"),
        (0, 0, "ticket"),
    ]
    rows = [analysis.summary_row(arm, r, level, 1 / 3, METRICS) for r, level, arm in order]
    analysis.write_summary(tmp_path, rows)
    back = analysis.read_summary(tmp_path)
    assert [(row["replicate"], row["level"], row["arm"]) for row in back] == [
        (0, 0, "ticket"),
        (0, 1, "ticket"),
        (0, 1, "reinit"),
        (0, 1, "shuffle"),
        (1, 0, "ticket"),
    ]
    assert back[0] == rows[4] and json.loads((tmp_path / "summary.json").read_text()) == back
    with open(tmp_path / "summary.csv", newline="") as file:
        assert next(csv.reader(file)) == list(COLUMNS)


def test_no_summary_yet(tmp_path):
    with pytest.raises(UserError, match="has no summary.csv yet"):
        analysis.read_summary(tmp_path)


# Points.


def row(arm, level, replicate=0, step=100, early=0.98, end=0.98):
    return {
        "arm": arm,
        "replicate": replicate,
        "level": level,
        "density": round(0.5**level, 9),
        "early_stop_step": step,
        "test_accuracy_early": early,
        "test_accuracy_end": end,
    }


def test_points():
    rows = [row("reinit", 1, 1, step=3), row("ticket", 1, 1), row("ticket", 0), row("reinit", 1, 0)]
    found = analysis.points(rows)
    assert [(p.arm, p.level, p.density, p.replicates) for p in found] == [
        ("ticket", 0, 1.0, (0,)),
        ("ticket", 1, 0.5, (1,)),
        ("reinit", 1, 0.5, (0, 1)),
    ]
    assert found[2].early_stop_step.tolist() == [100, 3]
    assert found[2].metric_early.tolist() == [0.98, 0.98]


def test_density_of_a_point_is_the_mean():
    rows = [{**row("ticket", 1, r), "density": d} for r, d in ((0, 0.2), (1, 0.4))]
    assert analysis.points(rows)[0].density == pytest.approx(0.3)


# Winning.


def verdict(*rows):
    """The smallest densities that win."""
    found = analysis.winning(rows)
    early, end = (wins[-1] if wins else None for wins in (found.early, found.end))
    return early, end, found.replicates


LOST = {"early": 0.90, "end": 0.90}


def test_wins_at_early_stop_and_at_the_end():
    rows = [row("ticket", 0), row("ticket", 1), row("reinit", 1, **LOST)]
    assert verdict(*rows) == ((0.5, 1), (0.5, 1), 1)


def test_wins_early_but_not_at_the_end():
    rows = [row("ticket", 0), row("ticket", 1, end=0.97), row("reinit", 1, **LOST)]
    assert verdict(*rows) == ((0.5, 1), None, 1)
    # The control catches up.
    rows = [row("ticket", 0), row("ticket", 1), row("reinit", 1, early=0.90, end=0.979)]
    assert verdict(*rows) == ((0.5, 1), None, 1)


def test_wins_at_the_end_but_not_early():
    rows = [row("ticket", 0), row("ticket", 1, step=101), row("reinit", 1, **LOST)]
    assert verdict(*rows) == (None, (0.5, 1), 1)
    rows = [row("ticket", 0), row("ticket", 1, early=0.97), row("reinit", 1, **LOST)]
    assert verdict(*rows) == (None, (0.5, 1), 1)
    rows = [row("ticket", 0), row("ticket", 1), row("reinit", 1, early=0.979, end=0.90)]
    assert verdict(*rows) == (None, (0.5, 1), 1)


def test_each_density_that_wins_is_named_and_no_other():
    rows = [row("ticket", 0)]
    for level in range(1, 5):
        rows += [row("ticket", level), row("reinit", level, **LOST)]
    rows += [row("ticket", 5)]  # without a control
    rows[3] = row("ticket", 2, step=101)
    rows[7] = row("ticket", 4, end=0.5)
    found = analysis.winning(rows[::-1])
    assert found.early == ((1 / 2, 1), (1 / 8, 1), (1 / 16, 1)) and found.compared == 4
    assert found.end == ((1 / 2, 1), (1 / 4, 1), (1 / 8, 1))


def test_smallest_density_wins_even_past_a_level_that_does_not():
    rows = [row("ticket", 0)]
    for level in range(1, 6):
        rows += [row("ticket", level), row("reinit", level, **LOST)]
    assert verdict(*rows)[:2] == ((1 / 32, 1), (1 / 32, 1))
    rows[-2:] = [row("ticket", 5, early=0.5, end=0.5), row("reinit", 5, **LOST)]
    rows[3] = row("ticket", 2, early=0.5, end=0.5)
    assert verdict(*rows)[:2] == ((1 / 16, 1), (1 / 16, 1))
    assert verdict(*rows[::-1])[:2] == ((1 / 16, 1), (1 / 16, 1))


def test_none_wins():
    assert verdict(row("ticket", 0), row("ticket", 1), row("reinit", 1)) == (None, None, 1)
    assert verdict() == (None, None, 0)


def test_without_control_or_dense_there_is_no_verdict():
    assert verdict(row("ticket", 0), row("ticket", 1)) == (None, None, 1)
    assert verdict(row("ticket", 1), row("reinit", 1, **LOST)) == (None, None, 0)
    rows = [row("ticket", 0), row("ticket", 1), row("shuffle", 1, **LOST)]
    assert verdict(*rows) == (None, None, 1)


def test_dense_network_is_no_ticket():
    assert verdict(row("ticket", 0), row("reinit", 0, **LOST)) == (None, None, 1)


def test_margins_hold_for_every_accuracy():
    """Exactly half a point behind dense is enough; exactly half a point ahead of reinit is not."""
    for k in range(200, 10_001, 7):
        dense, half, more = k / 10_000, (k - 50) / 10_000, (k - 51) / 10_000
        ticket = row("ticket", 1, early=half, end=half)
        lost = row("reinit", 1, early=0.0, end=0.0)
        top = row("ticket", 0, early=dense, end=dense)
        assert verdict(top, ticket, lost)[:2] == ((0.5, 1), (0.5, 1)), k
        ticket = row("ticket", 1, early=more, end=more)
        assert verdict(top, ticket, lost)[:2] == (None, None), k
        ticket = row("ticket", 1, early=dense, end=dense)
        assert verdict(top, ticket, row("reinit", 1, early=half, end=half))[:2] == (None, None), k
        control = row("reinit", 1, early=more, end=more)
        assert verdict(top, ticket, control)[:2] == ((0.5, 1), (0.5, 1)), k


def test_control_is_measured_against_the_ticket_early_and_against_dense_at_the_end():
    rows = [
        row("ticket", 0, early=0.98, end=0.98),
        row("ticket", 1, early=0.976, end=0.976),
        row("reinit", 1, early=0.974, end=0.974),
    ]
    assert verdict(*rows) == (None, (0.5, 1), 1)


def test_equal_early_stop_steps_are_enough():
    rows = [row("ticket", 0, step=100), row("ticket", 1, step=100), row("reinit", 1, **LOST)]
    assert verdict(*rows)[0] == (0.5, 1)


def replicated(tickets, controls=(0.90, 0.90, 0.90), dense=(0.98, 0.98, 0.98)):
    rows = [row("ticket", 0, r, early=a, end=a) for r, a in enumerate(dense)]
    rows += [row("ticket", 1, r, early=a, end=a) for r, a in enumerate(tickets) if a is not None]
    return rows + [
        row("reinit", 1, r, early=a, end=a) for r, a in enumerate(controls) if a is not None
    ]


def test_means_decide_and_replicates_are_counted():
    assert verdict(*replicated((0.98, 0.98, 0.98))) == ((0.5, 3), (0.5, 3), 3)
    assert verdict(*replicated((0.98, 0.99, 0.97))) == ((0.5, 2), (0.5, 2), 3)
    assert verdict(*replicated((0.974, 0.974, 0.99))) == ((0.5, 1), (0.5, 1), 3)
    assert verdict(*replicated((0.98, 0.98, 0.90))) == (None, None, 3)


def test_steps_are_means_too():
    rows = replicated((0.98, 0.98))
    rows[3]["early_stop_step"], rows[4]["early_stop_step"] = 150, 50
    assert verdict(*rows) == ((0.5, 1), (0.5, 2), 3)
    rows[3]["early_stop_step"] = 151
    assert verdict(*rows) == (None, (0.5, 2), 3)


def test_only_complete_replicates_are_compared():
    # Replicate 2 would turn the means if it counted.
    assert verdict(*replicated((0.98, 0.98, 0.5), (0.9, 0.9, None))) == ((0.5, 2), (0.5, 2), 3)
    assert verdict(*replicated((0.98, 0.98, None), (0.9, 0.9, 1.0))) == ((0.5, 2), (0.5, 2), 3)
    assert verdict(*replicated((0.98, None, None), (None, 0.9, 0.9))) == (None, None, 3)


def test_verdict_from_a_file(tmp_path):
    rows = [{**dict.fromkeys(COLUMNS, 0), **r} for r in replicated((0.98, 0.99, 0.97))]
    analysis.write_summary(tmp_path, rows)
    assert analysis.winning(analysis.read_summary(tmp_path)) == analysis.winning(rows)


# Paths.


def brute_force(shapes, mask):
    """Which weights of a chain of dense kernels lie on a path, unit by unit."""
    names = list(shapes)
    reach = [np.ones(shapes[names[0]][0], bool)]
    for name in names:
        reach.append((mask[name] * reach[-1][:, None]).any(0))
    needed = [np.ones(shapes[names[-1]][1], bool)]
    for name in reversed(names):
        needed.insert(0, (mask[name] * needed[0][None, :]).any(1))
    return {
        name: mask[name] * reach[i][:, None] * needed[i + 1][None, :]
        for i, name in enumerate(names)
    }


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh", "softplus", "linear"])
def test_connected_is_what_lies_on_a_path(activation):
    units = [7, 9, 8, 5, 3]
    dense = [
        keras.layers.Dense(n, activation=activation, name=f"d{i}") for i, n in enumerate(units[1:])
    ]
    model = keras.Sequential([keras.Input((7,)), *dense])
    rng = np.random.default_rng(0)
    for density in (0.05, 0.15, 0.3, 0.6):
        mask = {
            n: (rng.random(v.shape) < density).astype(np.uint8)
            for n, v in pruning.kernels(model).items()
        }
        wanted = brute_force({n: m.shape for n, m in mask.items()}, mask)
        found = analysis.connected(model, mask)
        assert all(np.array_equal(found[n], wanted[n]) for n in mask)
        assert masks.is_subset(found, mask)


def test_connected_sees_through_convolutions_pools_norms_and_shortcuts():
    x = keras.Input((8, 8, 2))
    h = keras.layers.Conv2D(3, 3, padding="same", name="a")(x)
    h = keras.layers.BatchNormalization()(h)
    h = keras.layers.MaxPooling2D()(keras.layers.ReLU()(h))
    y = keras.layers.Conv2D(3, 3, padding="same", name="b")(h)
    h = keras.layers.Add()([h, keras.layers.BatchNormalization()(y)])
    h = keras.layers.GlobalAveragePooling2D()(h)
    model = keras.Model(x, keras.layers.Dense(2, activation="softmax", name="out")(h))
    full = masks.ones({n: tuple(v.shape) for n, v in pruning.kernels(model).items()})
    assert all(m.all() for m in analysis.connected(model, full).values())
    cut = {n: m.copy() for n, m in full.items()}
    cut["b/kernel"][..., 1] = 0  # channel 1 still comes by the shortcut
    cut["a/kernel"][..., 2] = 0  # channel 2 comes from b only
    cut["out/kernel"][0] = 0  # channel 0 goes into b only
    found = analysis.connected(model, cut)
    assert found["a/kernel"][..., :2].all() and not found["a/kernel"][..., 2].any()
    # b: from channels 0 and 1 (2 is empty), to channel 2 (0 is not looked at, 1 is pruned).
    assert found["b/kernel"][:, :, :2, 2].all() and found["b/kernel"].sum() == 9 * 2
    assert np.array_equal(found["out/kernel"], cut["out/kernel"])


def test_taps_that_only_see_padding_lie_on_no_path():
    x = keras.Input((1, 1, 2))
    h = keras.layers.Conv2D(3, 3, padding="same", name="c")(x)
    model = keras.Model(x, keras.layers.Dense(2, name="out")(keras.layers.Flatten()(h)))
    full = masks.ones({n: tuple(v.shape) for n, v in pruning.kernels(model).items()})
    found = analysis.connected(model, full)["c/kernel"]
    assert found[1, 1].all() and found.sum() == 6


def test_collapse_names_what_is_cut():
    ones = masks.ones({"a": (4, 4), "b": (4, 3)})
    assert analysis.collapse(ones, ones) == (
        "density 100.0000%, on a path from input to output 100.0000%"
    )
    empty = {"a": np.zeros((4, 4), np.uint8), "b": ones["b"]}
    nothing = {n: np.zeros_like(m) for n, m in ones.items()}
    text = analysis.collapse(empty, nothing)
    assert "warning: empty: a" in text and "warning: on no path: b" in text
    few = {"a": np.eye(4, dtype=np.uint8) * np.array([1, 1, 1, 0], np.uint8), "b": ones["b"]}
    assert "fewer weights than outputs: a (3 of 16)" in analysis.collapse(few, few)


def test_a_network_of_19_thin_layers_neither_overflows_nor_vanishes():
    model = MODELS["vgg19"]((32, 32, 3), 10, 0)
    full = masks.ones({n: tuple(v.shape) for n, v in pruning.kernels(model).items()})
    rng = np.random.default_rng(0)
    one = {n: np.zeros_like(m) for n, m in full.items()}
    channel = 0
    for m in one.values():  # a single path
        after = int(rng.integers(m.shape[-1]))
        m[(1, 1, channel, after) if m.ndim == 4 else (channel, after)] = 1
        channel = after
    assert masks.kept(one) == 17
    found = analysis.connected(model, one)
    assert all(np.array_equal(found[n], one[n]) for n in one)
    assert all(m.all() for m in analysis.connected(model, full).values())


# Several workdirs.


def workdir(path, spec, levels, replicates=2, arms=("ticket",)):
    """A workdir as an experiment leaves it; accuracies tell arm, level and replicate."""
    rows = [
        analysis.summary_row(
            arm, r, level, density,
            [{"step": 9, "validation_loss": 1.0, "test_accuracy": 0.9 - level / 100 - r / 10
              - 0.05 * (arm != "ticket"), "seconds": 1.0}] * 2,
        )
        for level, density in levels.items() for r in range(replicates) for arm in arms
        if level or arm == "ticket"
    ]  # fmt: skip
    analysis.write_summary(path, rows)
    return path, spec


def test_compare_puts_methods_at_the_same_densities_together(tmp_path):
    imp = workdir(tmp_path / "imp", Spec(scope="layerwise"), {0: 1.0, 1: 0.5, 7: 0.201, 9: 0.1})
    snip = Spec(recipe="one_shot", scope="global", scorer="snip", density=(0.2, 0.1))
    rounds = Spec(recipe="one_shot", scope="erk", rounds=9, grasp_variant="absolute")
    one = workdir(tmp_path / "snip", snip, {1: 0.2, 2: 0.1}, arms=("ticket", "shuffle"))
    two = workdir(tmp_path / "grasp", rounds, {1: 0.2, 2: 0.1}, replicates=1)
    found = comparison.compare([imp, one, two])
    assert list(found.methods) == [
        "imp (scope layerwise)", "snip", "grasp (scope erk, rounds 9, grasp_variant absolute)"
    ]  # fmt: skip
    imp_name = "imp (scope layerwise)"
    assert found.densities == [0.2, 0.1]
    assert found.dense.replicates == (0, 1) and found.dense.density == 1.0
    assert found.at(imp_name, "ticket", 0.2).level == 7  # 0.201 is near enough
    assert found.at(imp_name, "shuffle", 0.2) is None and found.at(imp_name, "ticket", 0.4) is None
    shuffled = found.at("snip", "shuffle", 0.1)
    assert shuffled.metric_end.tolist() == pytest.approx([0.83, 0.73])
    rows = comparison.rows(found)
    assert [r["method"] for r in rows][:2] == ["dense", imp_name] and len(rows) == 1 + 3 + 4 + 2
    assert rows[0]["test_accuracy_end"] == pytest.approx(0.85)
    assert rows[0]["test_accuracy_end_deviation"] == pytest.approx(0.1 / 2**0.5)
    assert rows[-1]["test_accuracy_end_deviation"] is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"train_steps": 9}, r"differ in train_steps \(9, 50000\)"),
        ({"model": "conv2", "seed": 3}, r"differ in model \(conv2, lenet_300_100\), seed"),
        ({}, r"second workdir of imp \(scope layerwise\)"),
    ],
)
def test_compare_refuses_what_is_not_the_same_training(tmp_path, other, message):
    found = [
        workdir(tmp_path / str(i), spec, {0: 1.0, 1: 0.5})
        for i, spec in enumerate([Spec(), Spec(**other)])
    ]
    with pytest.raises(UserError, match=message):
        comparison.compare(found)


def test_compare_needs_a_finished_training(tmp_path):
    with pytest.raises(UserError, match="no training has finished"):
        comparison.compare([(tmp_path, Spec())])


def test_compare_needs_a_density_that_all_have(tmp_path):
    with pytest.raises(UserError, match="no workdirs given"):
        comparison.compare([])
    spec = Spec(recipe="one_shot", scope="global", density=(0.00004, 0.1))
    one = workdir(tmp_path / "a", spec, {1: 0.1, 2: 0.00004})
    two = workdir(tmp_path / "b", dataclasses.replace(spec, temperature=1.0), {1: 0.3})
    with pytest.raises(UserError, match=r"grasp: 4e-05, 0.1; grasp \(temperature 1.0\): 0.3"):
        comparison.compare([one, two])
    assert comparison.compare([one]).densities == [0.1, 0.00004]
    dense = workdir(tmp_path / "c", Spec(), {0: 1.0})
    with pytest.raises(UserError, match="no density at which all have tickets"):
        comparison.compare([dense, one])


def test_compare_takes_runs_that_were_watched_or_went_on_otherwise(tmp_path):
    watched = Spec(checkpoint_every=7, worker_timeout=9.0, histograms=True, replicates=2)
    other = Spec(recipe="one_shot", scope="global", scorer="snip", density=(0.5,))
    found = comparison.compare(
        [
            workdir(tmp_path / "imp", watched, {0: 1.0, 1: 0.5}),
            workdir(tmp_path / "snip", other, {1: 0.5}),
        ]
    )
    assert list(found.methods) == ["imp (scope layerwise)", "snip"]
