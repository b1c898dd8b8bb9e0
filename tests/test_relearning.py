"""Whether tickets relearn the network that they were pruned from."""

import csv
import dataclasses

import numpy as np
import pytest
import rich.console

from lth_tf import datasets, experiments, masks, pruning
from lth_tf.analysis import landscape
from lth_tf.analysis.summary import read_csv
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.experiments import relearning
from lth_tf.experiments.relearning import PRUNED
from lth_tf.report.relearning import relearning_figure, relearning_tables
from lth_tf.spec import Spec
from lth_tf.tasks import TASKS
from lth_tf.tickets import load_ticket, load_trained
from tests.test_tools import run

DIGITS = datasets.load("digits")
TASK = TASKS["classification"]
SPEC = Spec(
    model="lenet_8_6", dataset="digits", validation_size=100, batch_size=20, train_steps=60,
    eval_every=20, learning_rate=0.01, distribute="none", compile="off", levels=2, scope="global",
    prune_fraction=0.5, controls=("reinit",), control_levels=(2,), replicates=2,
    checkpoint_every=0,
)  # fmt: skip


# --- Numbers ---


def test_distances_and_angles_are_those_of_the_weights_named():
    a = {"x": np.array([[3.0, 0.0]], np.float32), "y": np.array([4.0]), "left out": np.ones(9)}
    b = {"x": np.array([[0.0, 3.0]], np.float32), "y": np.array([4.0]), "left out": np.zeros(9)}
    u, v = (landscape.flat(w, ["y", "x"]) for w in (a, b))
    assert u.tolist() == [4, 3, 0] and u.dtype == np.float64
    assert landscape.distance(u, v) == pytest.approx(18**0.5)
    assert landscape.angle(u, v) == pytest.approx(np.degrees(np.arccos(16 / 25)))
    assert landscape.angle(u, 2 * u) == 0 and np.isnan(landscape.angle(u, 0 * u))
    half = landscape.between(a, b, 0.5)
    assert half["x"].tolist() == [[1.5, 1.5]] and half["x"].dtype == np.float32
    assert landscape.between(a, b, 1.0)["y"].tolist() == [4.0]


def test_a_barrier_stands_above_the_straight_line():
    assert landscape.barrier([-0.2, 0, 0.5, 1, 1.2], [9, 1.0, 4.0, 3.0, 9]) == 2.0
    assert landscape.barrier([0, 0.5, 1], [3.0, 1.0, 0.0]) == 0
    assert {0.0, 1.0} <= set(relearning._shares(8)) and len(relearning._shares(29)) == 29


def test_predictions_ensembles_and_pairs():
    a = np.array([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]])
    b = np.array([[0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    assert landscape.disagreement(a, b) == pytest.approx(1 / 3)
    np.testing.assert_allclose(np.exp(landscape.ensemble([a, b])), (a + b) / 2)
    assert landscape.pairs("xyz", "xyz", True) == [("x", "y"), ("x", "z"), ("y", "z")]
    assert landscape.pairs("xy", "z", False) == [("x", "z"), ("y", "z")]


def test_statistics_between_two_networks_are_taken_anew():
    model = keras.Sequential([
        keras.Input((3,)), keras.layers.Dense(2, use_bias=False, name="fc"),
        keras.layers.BatchNormalization(name="norm"), keras.layers.Dense(2, name="output"),
    ])  # fmt: skip
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3)).astype(np.float32)
    y = rng.integers(0, 2, 20)
    weights = {n: v.numpy() for n, v in pruning.weights(model).items()}
    weights = {n: rng.random(w.shape).astype(np.float32) for n, w in weights.items()}
    looker = landscape.Looker(model, [tf.constant(x)], y, TASK, anew=True)
    hidden = x @ weights["fc/kernel"]
    normed = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-3)
    normed = normed * weights["norm/gamma"] + weights["norm/beta"]
    expected = normed @ weights["output/kernel"] + weights["output/bias"]
    np.testing.assert_allclose(looker.outputs(weights), expected, rtol=0.02, atol=0.02)
    as_stored = landscape.Looker(model, [tf.constant(x)], y, TASK)
    assert np.abs(as_stored.outputs(weights) - expected).max() > 0.1


# --- Workdirs ---


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relearning")
    experiments.run(SPEC, folder / "imp", DIGITS)
    rigl = {n: getattr(SPEC, n) for n in ("model", "dataset", "validation_size", "batch_size",
            "train_steps", "eval_every", "learning_rate", "distribute", "compile", "replicates",
            "checkpoint_every")}  # fmt: skip
    rigl = Spec(**rigl, recipe="sparse", scope="erk", density=(0.5, 0.25), update_every=10)
    experiments.run(rigl, folder / "rigl", DIGITS)
    return folder


@pytest.fixture(scope="module")
def found(work):
    spec, groups = relearning.groups([work / "imp", work / "rigl"])
    return relearning.relearn(spec, groups, DIGITS, examples=300, points=8)


def test_groups_are_tickets_controls_and_others_with_the_pruned_network_of_their_replicate(work):
    spec, groups = relearning.groups([work / "rigl", work / "imp"])
    assert spec.recipe == "sparse"
    assert list(groups) == ["rigl", "imp", "imp, reinit"]
    folder = work / "imp" / "replicate_01"
    ticket = load_ticket(folder / "level_02" / "ticket.safetensors")
    before = load_trained(folder / "level_01" / "trained.safetensors")
    cut = masks.apply(ticket.mask, before)
    for members in groups.values():
        assert [one.replicate for one in members] == [0, 1]
        assert all(np.array_equal(w, cut[n]) for n, w in members[1].pruned.items())
    reinit = load_ticket(folder / "level_02" / "branch_reinit" / "ticket.safetensors")
    start = groups["imp, reinit"][1].start
    assert all(np.array_equal(w, start[n]) for n, w in reinit.weights.items())
    # At another density each workdir has its nearest level.
    _, others = relearning.groups([work / "rigl", work / "imp"], 0.45)
    assert {round(one.density, 2) for each in others.values() for one in each} == {0.5}
    assert list(others) == ["rigl", "imp"]  # no control there


def test_names_tell_more_where_they_would_be_the_same(work):
    spec = experiments.read_spec(work / "rigl")
    other = work.parent / "other_rigl"
    if not other.exists():
        experiments.run(dataclasses.replace(spec, drop_fraction=0.2, replicates=1), other, DIGITS)
    _, groups = relearning.groups([work / "rigl", other])
    assert list(groups) == ["rigl (update_every 10)", "rigl (update_every 10, drop_fraction 0.2)"]


def test_numbers_are_those_of_the_files(work, found):
    folder = work / "imp" / "replicate_00" / "level_02"
    ticket = load_ticket(folder / "ticket.safetensors")
    end = load_trained(folder / "trained.safetensors", ticket)
    (row,) = [r for r in found.rows if (r["group"], r["replicate"]) == ("imp", 0)]
    moved = np.concatenate([np.ravel(w - ticket.weights[n]) for n, w in end.items()])
    assert row["distance_start_end"] == pytest.approx(np.linalg.norm(moved), rel=1e-5)
    metrics = read_csv(folder / "metrics.csv")
    assert row["test_accuracy"] == pytest.approx(metrics[-1]["test_accuracy"])
    # A ticket is nearer to what it was cut out of than the control, which has its mask alone.
    (other,) = [r for r in found.rows if (r["group"], r["replicate"]) == ("imp, reinit", 0)]
    assert row["angle_end_pruned"] < other["angle_end_pruned"]
    ends = {r["share"]: r["loss"] for r in found.lines
            if (r["group"], r["replicate"], r["line"]) == ("imp", 0, "start_end")}  # fmt: skip
    assert ends[0.0] > ends[1.0] > 0 and len(ends) == 8
    same = {r["share"]: r["loss"] for r in found.lines
            if (r["group"], r["replicate"], r["line"]) == ("imp", 0, "end_pruned")}  # fmt: skip
    assert same[0.0] == pytest.approx(ends[1.0], rel=1e-6)


def test_losses_at_the_ends_are_those_of_the_loop(work):
    folder = work / "imp" / "replicate_00" / "level_02"
    end = load_trained(folder / "trained.safetensors")
    from lth_tf.datasets import scaling
    from lth_tf.models import plain_model

    model = plain_model(SPEC, (8, 8, 1), 10, 0)
    x = scaling.scaled(DIGITS.test_inputs, DIGITS, SPEC)
    last = read_csv(folder / "metrics.csv")[-1]
    loss, accuracy = landscape.Looker(model, [x], DIGITS.test_labels, TASK).measured(end)
    assert loss == pytest.approx(last["test_loss"], rel=1e-5)
    assert accuracy == pytest.approx(last["test_accuracy"])


def test_groups_agree_within_and_between(found):
    names = ["imp", "imp, reinit", "rigl", PRUNED]
    assert set(found.ensembles) == set(names)
    counted = {(r["group"], r["other"]): r["pairs"] for r in found.agreement}
    assert counted == {
        (a, b): 1 if a == b else 4 for i, a in enumerate(names) for b in names[i:]
    }
    assert all(0 <= r["disagreement"] <= 1 for r in found.agreement)
    for name in names[:3]:
        mine = [r["test_accuracy"] for r in found.rows if r["group"] == name]
        assert found.ensembles[name][0] == pytest.approx(np.mean(mine))


def test_tables_and_figure_show_each_group(found, tmp_path):
    console = rich.console.Console(width=140, record=True)
    for table in relearning_tables(found):
        console.print(table)
    text = console.export_text()
    for word in ("angle of the end", "loss barrier", "of an ensemble", "pruned network", "reinit"):
        assert word in text
    relearning_figure(found, tmp_path / "a.png")
    relearning_figure(found, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_iterative_pruning_what_is_not_known_is_left_out(work, tmp_path):
    spec, groups = relearning.groups([work / "rigl"])
    alone = {name: each[:1] for name, each in groups.items()}
    found = relearning.relearn(spec, alone, DIGITS, examples=50, points=8)
    assert found.rows[0]["distance_end_pruned"] is None and found.agreement == []
    console = rich.console.Console(width=140, record=True)
    for table in relearning_tables(found):
        console.print(table)
    text = console.export_text()
    assert "no workdir tells what tickets were pruned from" in " ".join(text.split())
    assert "barrier from the" not in text and "differ" not in text
    relearning_figure(found, tmp_path / "a.png")


def test_the_command_writes_tables_and_figure(work, monkeypatch, capsys, tmp_path):
    words = [f"--workdir={work}/imp,{work}/rigl", f"--output={tmp_path}", "--examples=50"]
    code, out, err = run(monkeypatch, capsys, *words, "--points=8", name="relearn")
    assert code == 0, err
    assert str(tmp_path / "relearning.png") in out and (tmp_path / "relearning.png").exists()
    with (tmp_path / "interpolation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 2 * 8 and set(rows[0]) >= {"group", "line", "share", "loss"}
    assert len(read_csv(tmp_path / "relearning.csv")) == 6
    assert len(read_csv(tmp_path / "disagreement.csv")) == 10


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda work: [], "no workdirs given"),
        (lambda work: [work / "imp", work / "imp"], "second workdir of imp"),
        (lambda work: [work], "is not the workdir of an experiment"),
        (lambda work: [work / "imp", work / "other"], r"differ in train_steps \(61, 60\)"),
        (lambda work: [work / "unfinished"], "has no ticket that is trained"),
        (lambda work: [work / "more"], "replicate_02/level_02' is not trained to the end"),
    ],
)
def test_workdirs_that_do_not_go_together_are_said(work, make, said):
    others = {"other": {"train_steps": 61}, "unfinished": {}, "more": {"replicates": 3}}
    for name, changes in others.items():
        (work / name).mkdir(exist_ok=True)
        experiments.write_spec(work / name, dataclasses.replace(SPEC, **changes))
    for replicate in (work / "imp").glob("replicate_*"):
        if not (work / "more" / replicate.name).exists():
            (work / "more" / replicate.name).symlink_to(replicate)
    with pytest.raises(UserError, match=said):
        relearning.groups(make(work))


def test_numbers_out_of_range_are_said(found):
    with pytest.raises(UserError, match="points 3 and examples 10"):
        relearning.relearn(SPEC, {}, DIGITS, examples=10, points=3)
