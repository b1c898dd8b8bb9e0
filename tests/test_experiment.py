"""IMP and pruning before training: nesting, budgets, rewinding, resuming, refusing."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console

from lth_tf import (
    analysis,
    datasets,
    experiments,
    masks,
    models,
    pruning,
    scopes,
    storage,
    training,
)
from lth_tf.analysis.summary import FLOPS, columns, read_csv
from lth_tf.errors import UserError
from lth_tf.experiments import imp, one_shot, plan, workdirs
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket, load_ticket, load_trained
from lth_tf.training import initial_weights

DIGITS = datasets.load("digits")
BASE = Spec(
    dataset="digits",
    model="lenet_20_10",
    validation_size=100,
    train_steps=40,
    eval_every=20,
    batch_size=30,
    levels=3,
    prune_fraction_output=0.1,
    controls=("reinit",),
    control_levels=(2,),
    compile="off",  # XLA takes longer to compile than these take to train
)


PICKED = Spec(
    recipe="one_shot",
    dataset="digits",
    model="lenet_20_10",
    validation_size=100,
    train_steps=20,
    eval_every=10,
    batch_size=30,
    scope="global",
    density=(0.2, 0.5),
    samples_per_class=3,
    compile="off",
)


def spec(**changes):
    return dataclasses.replace(BASE, **changes)


def pick(**changes):
    """The spec of an experiment that prunes before training."""
    return dataclasses.replace(PICKED, **changes)


def folder(workdir, level, replicate=0):
    return workdir / f"replicate_{replicate:02d}" / f"level_{level:02d}"


def ticket(workdir, level, replicate=0, branch=None):
    here = folder(workdir, level, replicate)
    return load_ticket((here / f"branch_{branch}" if branch else here) / "ticket.safetensors")


def trained(workdir, level):
    return load_trained(folder(workdir, level) / "trained.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("imp")
    imp(spec(replicates=2), path, DIGITS)
    return path


def test_layout(workdir):
    names = {"ticket.safetensors", "trained.safetensors", "metrics.csv", "tensorboard"}
    for replicate in range(2):
        for level in range(4):
            found = {p.name for p in folder(workdir, level, replicate).iterdir()}
            assert found == names | ({"branch_reinit"} if level == 2 else set())
    assert (workdir / "spec.json").exists()


def test_masks_are_nested_and_budgets_exact(workdir):
    planned = plan(BASE, (8, 8, 1), 10)
    for replicate in range(2):
        previous = None
        for level in range(4):
            mask = ticket(workdir, level, replicate).mask
            for name, m in mask.items():
                rate = 0.1 if name.startswith("output") else 0.2
                assert m.sum() == scopes.count((1 - rate) ** level, m.size)
                assert m.sum() == planned.kept(level)[name]
            assert previous is None or masks.is_subset(mask, previous)
            previous = mask


def test_mask_is_the_top_of_the_trained_magnitudes(workdir):
    before, after = trained(workdir, 1), ticket(workdir, 2).mask
    for name, m in after.items():
        magnitude = np.abs(before[name])
        assert magnitude[m == 1].min() >= magnitude[(m == 0)].max()


def test_rewound_weights_are_bitwise_mask_times_saved(workdir):
    initial = ticket(workdir, 0)
    for level in range(1, 4):
        now = ticket(workdir, level)
        assert same(now.weights, masks.apply(now.mask, initial.weights))
        assert now.rewind_step == 0 and now.level == level
        assert now.origin["initial_sha256"] == initial.origin["initial_sha256"]


def test_trained_weights_keep_the_zeros(workdir):
    for level in range(4):
        for name, m in ticket(workdir, level).mask.items():
            assert not trained(workdir, level)[name][m == 0].any()


def test_control_has_the_mask_and_other_weights(workdir):
    own, control = ticket(workdir, 2), ticket(workdir, 2, branch="reinit")
    assert same(own.mask, control.mask)
    assert control.origin["arm"] == "reinit"
    for name, m in own.mask.items():
        assert (own.weights[name] != control.weights[name])[m == 1].all()


def test_replicates_differ(workdir):
    a, b = ticket(workdir, 0, 0), ticket(workdir, 0, 1)
    assert not np.array_equal(a.weights["fc1/kernel"], b.weights["fc1/kernel"])
    assert b.origin["seed"] == 1


def test_summary(workdir):
    rows = read_csv(workdir / "summary.csv")
    assert tuple(rows[0]) == columns(given=FLOPS) and len(rows) == 2 * (4 + 1)
    assert rows == json.loads((workdir / "summary.json").read_text())
    row = next(r for r in rows if r["level"] == 2 and r["arm"] == "reinit" and r["replicate"] == 1)
    metrics = read_csv(folder(workdir, 2, 1) / "branch_reinit" / "metrics.csv")
    best = min(metrics, key=lambda r: r["validation_loss"])
    assert row["early_stop_step"] == best["step"]
    assert row["test_accuracy_early"] == best["test_accuracy"]
    assert row["test_accuracy_end"] == metrics[-1]["test_accuracy"]
    assert row["density"] == ticket(workdir, 2, 1).density and row["steps"] == 40
    assert {r["arm"] for r in rows} == {"ticket", "reinit"}


def test_tensorboard_holds_what_is_promised(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    imp(spec(levels=1, controls=(), control_levels=(), histograms=True), tmp_path, DIGITS)
    events = EventAccumulator(str(folder(tmp_path, 1) / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    found = {*tags["tensors"], *tags["scalars"], *tags["histograms"]}
    assert found >= {
        "loss", "validation_loss", "validation_accuracy", "learning_rate",
        "density/total", "density/fc1/kernel", "kept/fc1/kernel",
    }  # fmt: skip


def test_finished_work_is_not_done_again_and_experiments_grow(tmp_path):
    imp(spec(levels=1, controls=(), control_levels=()), tmp_path, DIGITS)
    first = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    imp(spec(levels=2, controls=(), control_levels=(), replicates=2), tmp_path, DIGITS)
    assert all(p.stat().st_mtime_ns == t for p, t in first.items())
    assert len(list(tmp_path.rglob("trained.safetensors"))) == 6


def test_rewinding_to_a_later_step(tmp_path):
    s = spec(rewind_step=0.25, levels=1, control_levels=(1,))
    imp(s, tmp_path, DIGITS)
    saved = load_ticket(folder(tmp_path, 0) / "rewind.safetensors")
    now = ticket(tmp_path, 1)
    assert saved.rewind_step == now.rewind_step == 10
    assert same(now.weights, masks.apply(now.mask, saved.weights))
    assert not same(saved.weights, ticket(tmp_path, 0).weights)
    metrics = read_csv(folder(tmp_path, 1) / "metrics.csv")
    assert metrics[0]["step"] == 10 and metrics[-1]["step"] == 40
    control = read_csv(folder(tmp_path, 1) / "branch_reinit" / "metrics.csv")
    assert control[0]["step"] == 0  # new weights have no past


def require_shuffled(own, control, start):
    assert control.rewind_step == own.rewind_step and control.origin["arm"] == "shuffle"
    for name, m in own.mask.items():
        assert control.mask[name].sum() == m.sum()
        assert not np.array_equal(control.mask[name], m)
    assert same(control.weights, masks.apply(control.mask, start))


def test_shuffled_control_is_cut_out_of_the_initial_weights(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    imp(spec(replicates=2, controls=("reinit", "shuffle")), tmp_path / "copy", DIGITS)
    for replicate in range(2):
        own = ticket(tmp_path / "copy", 2, replicate)
        control = ticket(tmp_path / "copy", 2, replicate, branch="shuffle")
        require_shuffled(own, control, ticket(workdir, 0, replicate).weights)
        assert own.rewind_step == 0


def test_shuffled_control_is_cut_out_of_the_weights_rewound_to(tmp_path):
    s = spec(rewind_step=10, levels=1, controls=("shuffle",), control_levels=())
    imp(s, tmp_path, DIGITS)
    saved = load_ticket(folder(tmp_path, 0) / "rewind.safetensors").weights
    own = ticket(tmp_path, 1)
    require_shuffled(own, ticket(tmp_path, 1, branch="shuffle"), saved)
    metrics = read_csv(folder(tmp_path, 1) / "branch_shuffle" / "metrics.csv")
    assert (metrics[0]["step"], metrics[-1]["step"]) == (10, 40) and own.rewind_step == 10


def test_controls_that_rank_initial_weights_are_not_for_imp(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "copy")
    with pytest.raises(UserError, match="it needs tickets of lth-oneshot, not of lth-imp"):
        imp(spec(controls=("reinit", "invert")), tmp_path / "copy", DIGITS)


def test_protected_kernels_stay_whole_at_every_level(tmp_path):
    s = spec(levels=2, protect=("fc2*", "output/kernel"), train_steps=5, eval_every=5,
             controls=(), control_levels=())  # fmt: skip
    imp(s, tmp_path, DIGITS)
    for level in range(3):
        kept = {n: int(m.sum()) for n, m in ticket(tmp_path, level).mask.items()}
        assert kept == {
            "fc1/kernel": scopes.count(0.8**level, 1280), "fc2/kernel": 200, "output/kernel": 100
        }  # fmt: skip


@pytest.mark.parametrize("retrain, first, last", [("lr_rewind", 30, 40), ("finetune", 40, 50)])
def test_retraining_without_rewinding_weights(tmp_path, retrain, first, last):
    s = spec(
        retrain=retrain, retrain_steps=10, levels=1, controls=(), control_levels=(),
        lr_schedule="steps", lr_drops=(35,),
    )  # fmt: skip
    imp(s, tmp_path, DIGITS)
    now = ticket(tmp_path, 1)
    assert same(now.weights, masks.apply(now.mask, trained(tmp_path, 0)))
    metrics = read_csv(folder(tmp_path, 1) / "metrics.csv")
    assert (metrics[0]["step"], metrics[-1]["step"]) == (first, last)
    full = 1.2e-3 if retrain == "lr_rewind" else 1.2e-4
    assert metrics[0]["learning_rate"] == pytest.approx(full)
    assert metrics[-1]["learning_rate"] == pytest.approx(1.2e-4)


def test_one_shot_goes_there_in_one_pruning(tmp_path):
    imp(spec(one_shot=True, controls=(), control_levels=()), tmp_path, DIGITS)
    once = ticket(tmp_path, 1)
    assert not folder(tmp_path, 2).exists()
    assert {n: int(m.sum()) for n, m in once.mask.items()} == plan(BASE, (8, 8, 1), 10).kept(3)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("scope", ["layerwise", "global"])
def test_target_density_is_hit(tmp_path, scope):
    s = spec(
        scope=scope, target_density=0.55, train_steps=5, eval_every=5, controls=(),
        control_levels=(),
    )  # fmt: skip
    rows = imp(s, tmp_path, DIGITS)
    mask = ticket(tmp_path, len(rows) - 1).mask
    assert abs(masks.kept(mask) - 0.55 * masks.size(mask)) <= (1.5 if scope == "layerwise" else 0.5)
    assert 0.64 == pytest.approx(rows[-2]["density"], abs=0.02)


def test_mirrored_float64_run_ends_with_the_same_masks(tmp_path):
    for devices in (None, 2):
        distribute = "mirrored" if devices else "none"
        s = spec(precision="float64", distribute=distribute, devices=devices, train_steps=100,
                 eval_every=50)  # fmt: skip
        imp(s, tmp_path / distribute, DIGITS)
    for level in range(4):
        one, two = (ticket(tmp_path / d, level) for d in ("none", "mirrored"))
        assert same(one.mask, two.mask)
        for name, w in trained(tmp_path / "none", level).items():
            np.testing.assert_allclose(
                trained(tmp_path / "mirrored", level)[name], w, rtol=1e-8, atol=1e-11
            )


@pytest.mark.slow
def test_mirrored_float32_accuracy_lies_within_the_spread_of_seeds(tmp_path):
    kwargs = {"train_steps": 300, "eval_every": 50, "levels": 1, "controls": (),
              "control_levels": ()}  # fmt: skip
    seeds = imp(spec(replicates=4, **kwargs), tmp_path / "one", DIGITS)
    two = imp(spec(distribute="mirrored", devices=2, **kwargs), tmp_path / "two", DIGITS)
    for column in ("test_accuracy_end", "validation_loss_min"):
        for level in range(2):
            values = [r[column] for r in seeds if r["level"] == level]
            value = next(r[column] for r in two if r["level"] == level)
            slack = 3 * np.std(values, ddof=1)
            assert min(values) - slack <= value <= max(values) + slack


def test_another_spec_is_refused_and_named(workdir):
    with pytest.raises(UserError, match=r"batch_size is 30 there, 31 here.*train_steps is 40"):
        imp(spec(batch_size=31, train_steps=41), workdir, DIGITS)


def test_one_shot_on_an_iterative_workdir_is_refused(workdir):
    with pytest.raises(UserError, match=r"one_shot is False there, True here"):
        imp(spec(one_shot=True), workdir, DIGITS)


def test_a_first_try_that_finished_nothing_does_not_keep_the_workdir(tmp_path):
    with pytest.raises(UserError, match="batch_size 5000 exceeds"):
        imp(spec(batch_size=5000), tmp_path, DIGITS)
    with pytest.raises(UserError, match="not finite"):
        imp(spec(optimizer="sgd", learning_rate=1e30, levels=1, control_levels=(1,)), tmp_path,
            DIGITS)  # fmt: skip
    imp(spec(levels=0, controls=(), control_levels=()), tmp_path, DIGITS)


REWOUND = spec(levels=1, rewind_step=10, controls=(), control_levels=())


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewound")
    imp(REWOUND, path, DIGITS)
    return path


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["metrics.csv", "rewind.safetensors", "trained.safetensors"])
def test_a_level_that_lost_a_file_is_done_again_alike(rewound, tmp_path, name):
    shutil.copytree(rewound, tmp_path / "copy")
    (folder(tmp_path / "copy", 0) / name).unlink()
    imp(REWOUND, tmp_path / "copy", DIGITS)
    assert contents(tmp_path / "copy") == contents(rewound)


def test_a_ticket_of_another_spec_is_not_adopted(tmp_path):
    s = spec(levels=0, controls=(), control_levels=())
    imp(s, tmp_path, DIGITS)
    (tmp_path / "spec.json").unlink()
    with pytest.raises(UserError, match="ticket of another experiment"):
        imp(dataclasses.replace(s, batch_size=20), tmp_path, DIGITS)


def test_a_smaller_run_loses_no_rows(tmp_path):
    plain = spec(levels=2, controls=(), control_levels=())
    rows = imp(plain, tmp_path, DIGITS)
    again = imp(dataclasses.replace(plain, levels=1), tmp_path, DIGITS)
    assert sorted(r["level"] for r in again) == [0, 1, 2]
    assert read_csv(tmp_path / "summary.csv") == rows


def test_full_disk_is_one_sentence_wherever_it_strikes(tmp_path):
    """Many histograms fill the disk from TensorFlow's C++; needs root for a tiny tmpfs."""
    if os.geteuid() or subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("cannot mount a tmpfs here")
    try:
        s = spec(histograms=True, eval_every=1, controls=(), control_levels=())
        with pytest.raises(UserError, match="the disk is full.*what is finished is kept"):
            imp(s, tmp_path / "run", DIGITS)
        assert load_ticket(folder(tmp_path / "run", 0) / "ticket.safetensors").level == 0
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_damaged_ticket_is_refused_and_can_be_made_anew(tmp_path):
    s = spec(levels=1, controls=(), control_levels=())
    imp(s, tmp_path, DIGITS)
    path = folder(tmp_path, 1) / "ticket.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    with pytest.raises(UserError, match="truncated.*delete it"):
        imp(s, tmp_path, DIGITS)
    path.unlink()
    imp(s, tmp_path, DIGITS)
    assert path.read_bytes() == whole


def test_divergence_keeps_what_is_finished(tmp_path):
    s = spec(controls=(), control_levels=())
    imp(dataclasses.replace(s, levels=0), tmp_path, DIGITS)
    lab = experiments.Laboratory(s, tmp_path, DIGITS)
    first = ticket(tmp_path, 0)
    bad = dataclasses.replace(
        first, weights={n: w * np.float32(1e30) for n, w in first.weights.items()}, level=1
    )
    with pytest.raises(UserError, match=r"replicate 0 level 1 ticket: .*finite at step 0.*kept"):
        lab.train(folder(tmp_path, 1), bad)
    assert not (folder(tmp_path, 1) / "trained.safetensors").exists()
    assert trained(tmp_path, 0)


def test_a_violated_mask_never_reaches_the_disk(tmp_path):
    broken = ticket_with_violation()
    with pytest.raises(pruning.InvariantError):
        broken.save(tmp_path / "ticket.safetensors")
    assert not list(tmp_path.iterdir())


def ticket_with_violation():
    weights = {"fc/kernel": np.ones((2, 2), np.float32)}
    mask = {"fc/kernel": np.array([[1, 0], [1, 1]], np.uint8)}
    return Ticket(mask, weights, 1, 0, {}, BASE)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"control_levels": (9,)}, r"control_levels \[9\] are out of range"),
        ({"prune_fraction": 0.0, "prune_fraction_output": 0.0}, "nothing would ever be pruned"),
        (
            {"prune_fraction": 0.0, "target_density": 0.5, "prune_fraction_output": 0.5},
            "cannot be reached",
        ),
        ({"levels": 60}, "nothing would be left of|at least"),
        ({"protect": ("fc1*", "conv*")}, "protect 'conv[*]' fits no kernel; .* fc1/kernel, fc2"),
        ({"protect": ("*",)}, "nothing would ever be pruned"),
    ],
)
def test_refuses(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        imp(spec(**{"train_steps": 1, "eval_every": 1, **changes}), tmp_path, DIGITS)


FLAGS = [
    "--dataset=digits", "--model=lenet_20_10", "--validation_size=100", "--train_steps=400",
    "--eval_every=50", "--batch_size=30", "--levels=4", "--rewind_step=100", "--controls=reinit",
    "--compile=off",
]  # fmt: skip


def command(workdir, *flags):
    return [sys.executable, "-m", "lth_tf.tools.imp", f"--workdir={workdir}", *FLAGS, *flags]


def contents(workdir):
    """Every file that must repeat bit for bit; seconds are cut out."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.suffix == ".safetensors" or name == "spec.json":
            found[name] = path.read_bytes()
        elif path.suffix == ".csv":
            with open(path, newline="") as file:
                found[name] = [
                    {k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
                ]
    return found


def interrupted(s, workdir):
    """Leaves a workdir whose first training has a checkpoint."""
    with pytest.raises(training.Interrupted, match="stopped at step 20 of 40.*is kept"):
        with experiments.opened(s, workdir, DIGITS, None) as lab:
            lab.asked._came = True
            lab.train(folder(workdir, 0), lab.ticket(folder(workdir, 0), lambda: lab.dense(0)))


def test_an_interrupted_first_training_is_not_taken_over_and_goes_on(tmp_path):
    s = spec(levels=0, controls=(), control_levels=(), checkpoint_every=0)
    interrupted(s, tmp_path / "a")
    assert [p.name for p in folder(tmp_path / "a", 0).glob("checkpoint_*")]
    with pytest.raises(UserError, match="learning_rate is 0.0012 there, 0.1 here"):
        imp(dataclasses.replace(s, learning_rate=0.1), tmp_path / "a", DIGITS)
    for name in ("a", "b"):
        imp(s, tmp_path / name, DIGITS)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_damaged_summary_is_one_sentence(tmp_path):
    s = spec(levels=0, controls=(), control_levels=())
    imp(s, tmp_path, DIGITS)
    (tmp_path / "summary.csv").write_text("arm,level\nticket\n")
    with pytest.raises(UserError, match="summary.csv' is damaged.*delete it"):
        imp(s, tmp_path, DIGITS)


def test_second_process_on_a_workdir_is_refused(tmp_path):
    from lth_tf import storage

    with storage.lock(tmp_path):
        with pytest.raises(UserError, match="another process is working in"):
            imp(BASE, tmp_path, DIGITS)


# Files that are whole, but not the ones that are meant.


def exchange(one, other):
    beside = one.with_name("beside")
    for source, target in ((one, beside), (other, one), (beside, other)):
        source.rename(target)


def everything(work):
    return {p: p.read_bytes() for p in work.rglob("*") if p.is_file()}


LEVELS = ["replicate_00/level_01", "replicate_00/level_02"]
REPLICATES = ["replicate_00/level_02", "replicate_01/level_02"]
ARMS = ["replicate_00/level_02", "replicate_00/level_02/branch_reinit"]


@pytest.mark.parametrize("folders", [LEVELS, REPLICATES, ARMS])
@pytest.mark.parametrize("name", ["metrics.csv", "trained.safetensors", "ticket.safetensors"])
def test_exchanged_files_are_refused_and_nothing_is_changed(workdir, tmp_path, name, folders):
    work = tmp_path / "work"
    shutil.copytree(workdir, work)
    exchange(*(work / f / name for f in folders))
    before = everything(work)
    what = "is not what the training of the weights" if "csv" in name else "is whole, but not the"
    with pytest.raises(UserError, match=f"{name}' {what}"):
        imp(spec(replicates=2), work, DIGITS)
    with pytest.raises(UserError, match=f"{name}' {what}"):
        analysis.read_summary(work)
    assert everything(work) == before


def test_trained_weights_of_another_ticket_are_refused(workdir, tmp_path):
    """The same level of the same replicate, but of another experiment."""
    work, other = tmp_path / "work", tmp_path / "other"
    shutil.copytree(workdir, work)
    imp(spec(levels=1, controls=(), control_levels=(), batch_size=31), other, DIGITS)
    for name in ("trained.safetensors", "metrics.csv"):
        shutil.copy(folder(other, 1) / name, folder(work, 1) / name)
    with pytest.raises(UserError, match="holds the weights of another ticket than the one beside"):
        imp(spec(replicates=2), work, DIGITS)


def test_a_row_that_was_added_to_the_summary_does_not_live_on(workdir, tmp_path):
    work = tmp_path / "work"
    shutil.copytree(workdir, work)
    whole = (work / "summary.csv").read_text()
    for text in (
        whole + "ticket,0,9,0.01,20,0.1,0.99,0.99,40,1.0,0.01,0.01\n",
        whole.replace("ticket,0,3,0.5", "ticket,0,3,0.6"),
    ):
        assert text != whole
        (work / "summary.csv").write_text(text)
        with pytest.raises(UserError, match="summary.csv' does not say what the trainings.*anew"):
            analysis.read_summary(work)
        with pytest.warns(UserWarning, match="summary.csv is made anew of each metrics.csv.*level"):
            rows = imp(spec(replicates=2), work, DIGITS)
        assert (work / "summary.csv").read_text() == whole and len(rows) == 10
    (work / "summary.csv").unlink()
    imp(spec(replicates=2, levels=2), work, DIGITS)
    assert (work / "summary.csv").read_text() == whole


def test_a_checkpoint_of_another_training_is_refused_and_left_alone(tmp_path):
    s = spec(levels=0, controls=(), control_levels=(), checkpoint_every=0)
    for name, seed in (("a", 0), ("b", 1)):
        interrupted(dataclasses.replace(s, seed=seed), tmp_path / name)
    (theirs,) = folder(tmp_path / "b", 0).glob("checkpoint_*")
    shutil.copy(theirs, folder(tmp_path / "a", 0))
    before = everything(tmp_path / "a")
    with pytest.raises(UserError, match="of the training of another ticket"):
        imp(s, tmp_path / "a", DIGITS)
    assert everything(tmp_path / "a") == before


def test_logs_that_were_deleted_come_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def logged():
        events = EventAccumulator(str(folder(tmp_path, 1) / "tensorboard"))
        events.Reload()
        return {
            tag: [(e.step, e.tensor_proto) for e in events.Tensors(tag)]
            for tag in events.Tags()["tensors"]
            if tag != "seconds"
        }

    s = spec(levels=1, controls=(), control_levels=())
    imp(s, tmp_path, DIGITS)
    before = logged()
    assert {"loss", "test_accuracy", "density/total"} < set(before)
    shutil.rmtree(folder(tmp_path, 1) / "tensorboard")
    with pytest.warns(UserWarning, match="replicate 0 level 1 ticket: its TensorBoard logs were"):
        imp(s, tmp_path, DIGITS)
    assert logged() == before


# Pruning before training.


EVERYTHING = pick(
    dense=True, controls=("reinit", "shuffle", "invert", "absolute"), control_levels=(2,)
)


@pytest.fixture(scope="module")
def picked(tmp_path_factory):
    path = tmp_path_factory.mktemp("one_shot")
    one_shot(EVERYTHING, path, DIGITS)
    return path


def metrics(workdir, level, branch=""):
    return read_csv(folder(workdir, level) / branch / "metrics.csv")


def test_one_shot_layout(picked):
    names = {"ticket.safetensors", "trained.safetensors", "metrics.csv", "tensorboard"}
    branches = {f"branch_{n}" for n in ("reinit", "shuffle", "invert", "absolute")}
    assert sorted(p.name for p in folder(picked, 0).parent.iterdir()) == [
        "level_00", "level_01", "level_02"
    ]  # fmt: skip
    for level in range(3):
        found = {p.name for p in folder(picked, level).iterdir()}
        assert found == names | (branches if level == 2 else set())
    for branch in branches:
        assert {p.name for p in (folder(picked, 2) / branch).iterdir()} == names


def test_levels_of_one_shot_have_exactly_their_densities_from_the_highest_on(picked):
    for level, density in enumerate((1.0, 0.5, 0.2)):
        found = ticket(picked, level)
        assert masks.kept(found.mask) == scopes.count(density, 1580) and found.level == level


def test_tickets_of_one_shot_are_mask_times_initial_weights(picked):
    start, _ = initial_weights(PICKED, (8, 8, 1), 10, seed=0)
    assert same(ticket(picked, 0).weights, start)
    for level in (1, 2):
        now = ticket(picked, level)
        assert same(now.weights, masks.apply(now.mask, start)) and now.rewind_step == 0
        for name, m in now.mask.items():
            assert not trained(picked, level)[name][m == 0].any()
        assert not same(trained(picked, level), now.weights)


def test_origin_holds_how_a_ticket_was_scored(picked):
    own, control = ticket(picked, 2), ticket(picked, 2, branch="invert")
    wanted = {"rounds": 1, "samples": 30, "batch_size": 30, "batch_norm": "train"}
    assert own.origin["scoring"] == control.origin["scoring"] == wanted
    assert own.spec.scorer == "grasp" and own.spec.recipe == "one_shot"
    assert "scoring" not in ticket(picked, 0).origin


def test_controls_of_one_shot(picked):
    own = ticket(picked, 2)
    found = {n: ticket(picked, 2, branch=n) for n in ("reinit", "shuffle", "invert", "absolute")}
    for name, control in found.items():
        assert control.origin["arm"] == name and control.level == 2
        assert masks.kept(control.mask) == masks.kept(own.mask)
        assert same(control.mask, own.mask) == (name == "reinit")
        start = ticket(picked, 0).weights
        cut = masks.apply(control.mask, start)
        assert same(control.weights, cut) == (name != "reinit")
        assert metrics(picked, 2, f"branch_{name}")[-1]["step"] == 20
    assert masks.overlap(found["invert"].mask, own.mask) == 0


def test_metrics_and_summary_of_one_shot(picked):
    rows = read_csv(picked / "summary.csv")
    arms = ["ticket", "ticket", "ticket", "absolute", "invert", "reinit", "shuffle"]
    assert [r["arm"] for r in rows] == arms
    assert [r["level"] for r in rows] == [0, 1, 2, 2, 2, 2, 2]
    assert [r["density"] for r in rows[:3]] == [1.0, 0.5, 0.2]
    for row in rows:
        branch = "" if row["arm"] == "ticket" else f"branch_{row['arm']}"
        seen = metrics(picked, row["level"], branch)
        assert [r["step"] for r in seen] == [0, 10, 20]
        best = min(seen, key=lambda r: r["validation_loss"])
        assert row["early_stop_step"] == best["step"]
        assert row["test_accuracy_end"] == seen[-1]["test_accuracy"]


def test_score_only_writes_the_tickets_that_a_later_run_trains(picked, tmp_path):
    rows = one_shot(EVERYTHING, tmp_path, DIGITS, score_only=True)
    found = contents(tmp_path)
    assert rows == [] and set(found) == {
        "spec.json", *(f"replicate_00/level_0{n}/ticket.safetensors" for n in (1, 2))
    }
    assert not list(tmp_path.rglob("tensorboard"))
    at_once = contents(picked)
    for name, content in found.items():  # same seed, same bytes
        assert content == at_once[name], name
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    one_shot(EVERYTHING, tmp_path, DIGITS)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert contents(tmp_path) == at_once


def test_one_shot_grows_without_training_again(tmp_path):
    small = pick(scorer="random", density=(0.5,))
    one_shot(small, tmp_path, DIGITS)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    grown = dataclasses.replace(small, dense=True, replicates=2, controls=("shuffle",))
    rows = one_shot(grown, tmp_path, DIGITS)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items()) and len(before) == 2
    assert [(r["replicate"], r["level"], r["arm"]) for r in read_csv(tmp_path / "summary.csv")] == [
        (r, level, arm) for r in (0, 1)
        for level, arm in ((0, "ticket"), (1, "ticket"), (1, "shuffle"))
    ]  # fmt: skip
    assert len(rows) == 6
    one, other = (ticket(tmp_path, 1, replicate) for replicate in (0, 1))
    assert (one.origin["seed"], other.origin["seed"]) == (0, 1)
    assert not same(one.mask, other.mask)
    assert same(other.weights, masks.apply(other.mask, ticket(tmp_path, 0, 1).weights))


def test_without_dense_there_is_no_level_0(tmp_path):
    rows = one_shot(pick(scorer="magnitude", density=(0.5,)), tmp_path, DIGITS)
    assert [(r["arm"], r["level"]) for r in rows] == [("ticket", 1)]
    assert not folder(tmp_path, 0).exists()


@pytest.mark.parametrize("scope", scopes.SCOPES)
def test_every_scope_is_exact_and_honours_min_per_layer(tmp_path, scope):
    network = {"model": "lenet_3_40", "scope": scope, "density": (0.5,), "scorer": "magnitude"}
    one_shot(pick(min_per_layer=60, **network), tmp_path, DIGITS, score_only=True)
    mask = ticket(tmp_path, 1).mask
    assert all(m.sum() >= 60 for m in mask.values())
    if scope == "layerwise":  # 192, 120 and 400 weights
        assert [int(m.sum()) for m in mask.values()] == [96, 60, 200]
    else:
        assert masks.kept(mask) == 356


@pytest.mark.filterwarnings("ignore:density:UserWarning")
def test_min_per_layer_takes_from_the_others(tmp_path):
    for least in (0, 20):
        s = pick(scorer="magnitude", density=(0.05,), min_per_layer=least)
        one_shot(s, tmp_path / str(least), DIGITS, score_only=True)
    without, guarded = (ticket(tmp_path / str(n), 1).mask for n in (0, 20))
    assert min(m.sum() for m in without.values()) < 20 <= min(m.sum() for m in guarded.values())
    assert masks.kept(without) == masks.kept(guarded) == 79


def test_float64_one_shot(tmp_path):
    one_shot(pick(precision="float64", density=(0.2,), rounds=2), tmp_path, DIGITS)
    now = ticket(tmp_path, 1)
    assert {w.dtype for w in (*now.weights.values(), *trained(tmp_path, 1).values())} == {
        np.dtype(np.float64)
    }
    assert masks.kept(now.mask) == 316 and now.origin["scoring"]["rounds"] == 2
    assert metrics(tmp_path, 1)[-1]["loss"] < metrics(tmp_path, 1)[0]["validation_loss"]


def test_protected_kernels_are_whole_and_the_total_is_exact(tmp_path):
    s = pick(scorer="snip", protect=("output*",))
    one_shot(s, tmp_path, DIGITS, score_only=True)
    for level, density in ((1, 0.5), (2, 0.2)):
        mask = ticket(tmp_path, level).mask
        assert mask["output/kernel"].all() and masks.kept(mask) == scopes.count(density, 1580)


# What of the network is cut.


class Said:
    """Progress that keeps what it is told."""

    def __init__(self, plan):
        self.found = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def say(self, text):
        self.found.append(text)


CUT = pick(scorer="magnitude", density=(0.9, 0.005))


def test_a_kernel_that_is_cut_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"density 0\.5063%.*\n  warning: .*fc1/kernel") as caught:
        one_shot(CUT, tmp_path, DIGITS, score_only=True)
    assert len(caught) == 1  # not for the level at which nothing is cut
    mask = ticket(tmp_path, 2).mask
    assert masks.kept(mask) == 8 and not mask["fc1/kernel"].any()
    model = initial_model()
    assert str(caught[0].message) == analysis.collapse(mask, analysis.connected(model, mask))


def initial_model():
    return models.build(PICKED, (8, 8, 1), 10, 0)


def test_what_is_cut_is_said_where_there_is_progress(tmp_path, recwarn):
    from lth_tf.callbacks.progress import Progress

    console = rich.console.Console(file=io.StringIO(), width=60)
    one_shot(CUT, tmp_path, DIGITS, lambda p: Progress(console, p.steps), score_only=True)
    lines = console.file.getvalue().splitlines()
    assert lines[0].startswith("density 90.0000%, on a path from input to output ")
    assert lines[1].startswith("density 0.5063%, on a path from input to output 0.0000%")
    assert lines[2] == "  warning: empty: fc1/kernel, fc2/kernel"
    assert not [w for w in recwarn if "density" in str(w.message)]
    # A ticket that is there is not looked at again.
    again = Said(None)
    one_shot(CUT, tmp_path, DIGITS, lambda p: again, score_only=True)
    assert again.found == []


# Refusals and resuming.


def test_another_spec_of_one_shot_is_refused_and_named(picked):
    with pytest.raises(UserError, match=r"scorer is 'grasp' there, 'snip' here"):
        one_shot(pick(scorer="snip"), picked, DIGITS)
    with pytest.raises(UserError, match=r"density is \[0.5, 0.2\] there, \[0.1\] here"):
        one_shot(pick(density=(0.1,)), picked, DIGITS)


def test_the_other_recipe_is_refused_and_named(picked, workdir):
    with pytest.raises(UserError, match=r"recipe is 'one_shot' there, 'imp' here"):
        imp(spec(), picked, DIGITS)
    with pytest.raises(UserError, match=r"recipe is 'imp' there, 'one_shot' here"):
        one_shot(pick(), workdir, DIGITS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"controls": ("shuffle",), "control_levels": (3,)}, r"\[3\] are out of range.*1 to 2"),
        ({"density": (1e-6,)}, "leaves nothing"),
        ({"protect": ("conv*",)}, "fits no kernel"),
        ({"samples_per_class": 500}, "samples_per_class 500 cannot be had: class 0 has"),
        ({"scope": "uniform"}, "the first kernel 'fc1/kernel', which stays dense"),
        ({"scope": "layerwise", "density": (0.001,)}, ""),
        ({"min_per_layer": 150}, "316 weights are too few for min_per_layer 150"),
    ],
)
def test_one_shot_refuses(tmp_path, changes, words):
    if not words:
        with pytest.warns(UserWarning, match="empty: fc2/kernel, output/kernel"):
            one_shot(pick(**changes), tmp_path, DIGITS, score_only=True)
        return
    with pytest.raises(UserError, match=words):
        one_shot(pick(**changes), tmp_path, DIGITS, score_only=True)


@pytest.mark.slow
def test_a_killed_one_shot_ends_as_if_nothing_had_happened(tmp_path):
    """SIGKILL while the second ticket is picked, in a hundred rounds; then to the end."""
    s = pick(scorer="synflow", density=(0.2, 0.05), controls=("shuffle",), train_steps=100)
    code = (
        "import json, sys; from lth_tf import datasets, experiments; from lth_tf.spec import Spec; "
        "s = Spec.from_dict(json.loads(sys.argv[1])); "
        "experiments.one_shot(s, sys.argv[2], datasets.load('digits'))"
    )
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, json.dumps(s.as_dict()), killed])
    while len(list(killed.rglob("*.safetensors"))) < 4 and process.poll() is None:
        time.sleep(0.002)
    time.sleep(0.03)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = {p: p.stat().st_mtime_ns for p in killed.rglob("*.safetensors")}
    assert 4 <= len(before) < 8
    for path in (tmp_path / "calm", killed):
        one_shot(s, path, DIGITS)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    calm, killed = contents(tmp_path / "calm"), contents(killed)
    assert calm.keys() == killed.keys() and len(calm) == 8 + 4 + 2
    assert not [name for name in calm if calm[name] != killed[name]]


# What a workdir is kept from.


def test_a_control_that_such_tickets_cannot_have_is_refused_before_anything_is_written(tmp_path):
    imp = Spec(dataset="digits", model="lenet_20_10", validation_size=300, controls=("invert",))
    with pytest.raises(UserError, match="'invert' ranks initial weights anew"):
        experiments.plan(imp, (8, 8, 1), 10)
    with pytest.raises(UserError, match="'absolute' changes nothing for scorer snip"):
        experiments.plan(
            dataclasses.replace(imp, recipe="one_shot", scorer="snip", controls=("absolute",)),
            (8, 8, 1), 10,
        )  # fmt: skip
    with pytest.raises(UserError, match="invert"):
        experiments.imp(imp, tmp_path, datasets.load("digits"))
    assert not (tmp_path / "spec.json").exists()


def test_tickets_that_were_only_scored_are_not_taken_over(tmp_path):
    spec = Spec(
        recipe="one_shot", dataset="digits", model="lenet_20_10", validation_size=300,
        train_steps=10, compile="off", scorer="magnitude", density=(0.5,),
    )  # fmt: skip
    data = datasets.load("digits")
    experiments.one_shot(spec, tmp_path, data, score_only=True)
    before = (folder(tmp_path, 1) / "ticket.safetensors").read_bytes()
    for other, message in (
        (dataclasses.replace(spec, scorer="random"), "scorer is 'magnitude' there, 'random' here;"),
        (Spec(dataset="digits", validation_size=300), "recipe is 'one_shot' there, 'imp' here;"),
    ):
        with pytest.raises(UserError, match=message):
            experiments.run(other, tmp_path, data)
    assert (folder(tmp_path, 1) / "ticket.safetensors").read_bytes() == before


def test_a_run_builds_its_network_once(tmp_path, monkeypatch):
    built = []
    own = models.build
    monkeypatch.setattr(models, "build", lambda *given: built.append(given) or own(*given))
    densities = {"scorer": "snip", "density": (0.5, 0.2, 0.1)}
    one_shot(pick(**densities), tmp_path / "scored", DIGITS, score_only=True)
    assert len(built) == 1
    one_shot(pick(**densities, train_steps=5), tmp_path / "trained", DIGITS)
    assert len(built) == 2
    own_only = {"controls": (), "control_levels": ()}  # a control draws its weights anew
    imp(spec(levels=2, train_steps=5, replicates=2, **own_only), tmp_path / "imp", DIGITS)
    assert len(built) == 4  # the second replicate's weights are drawn by building it


# The threads that a workdir was begun with.


def said_by(recwarn, workdir, **changes):
    recwarn.clear()
    imp(spec(train_steps=20, eval_every=20, controls=(), control_levels=(), **changes), workdir,
        DIGITS)  # fmt: skip
    return [str(w.message) for w in recwarn if "thread" in str(w.message)]


def test_a_workdir_remembers_its_threads_and_says_when_there_are_others(tmp_path, recwarn):
    assert said_by(recwarn, tmp_path, levels=0) == []
    path, here = tmp_path / "execution.json", workdirs.threads()
    assert json.loads(path.read_text()) == {
        "engine": "tensorflow", "compact_training": "auto", "format_number": storage.FORMAT,
        "threads": here,
    }  # fmt: skip
    path.rename(path := tmp_path / "threads.json")  # as it was called before there were engines
    before = (tmp_path / "spec.json").read_bytes()
    assert said_by(recwarn, tmp_path, levels=0) == []
    path.write_text(json.dumps({"threads": here + 3}))
    (said,) = said_by(recwarn, tmp_path, levels=1)
    assert f"begun with {here + 3} thread(s) for each operation, and now there are {here}:" in said
    assert f"TF_NUM_INTRAOP_THREADS={here + 3}" in said
    assert json.loads(path.read_text()) == {"threads": here + 3}  # what it was begun with
    assert "thread" not in (tmp_path / "spec.json").read_text() and b"thread" not in before
    for damaged in ("", "[3]", '{"threads": "many"}', "[" * 100_000, '{"threads": 1e400}', "{}",
                    '{"threads": 0}', '{"threads": true}'):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"threads.json' .*delete it"):
            workdirs.read_execution(tmp_path)
    path.unlink()  # a workdir of before
    assert said_by(recwarn, tmp_path, levels=1) == []
    assert not path.exists()


def test_a_trunk_of_other_threads_is_told(tmp_path, recwarn):
    assert said_by(recwarn, tmp_path / "trunk", levels=0) == []
    path, here = tmp_path / "trunk" / "execution.json", workdirs.threads()
    path.write_text(json.dumps({"threads": here + 3}))
    few = spec(train_steps=20, eval_every=20, controls=(), control_levels=(), levels=0)
    recwarn.clear()
    imp(few, tmp_path / "run", DIGITS, trunk=tmp_path / "trunk")
    (said,) = [str(w.message) for w in recwarn if "thread" in str(w.message)]
    assert "trunk' was begun with" in said and f"TF_NUM_INTRAOP_THREADS={here + 3}" in said


def test_the_threads_are_those_that_tensorflow_takes(monkeypatch):
    threading = workdirs.tf.config.threading
    monkeypatch.delenv("TF_NUM_INTRAOP_THREADS", raising=False)
    for asked, told, wanted in (
        ("", 0, len(os.sched_getaffinity(0))), ("5", 0, 5), ("many", 0, workdirs.threads()),
        ("5", 3, 3),
    ):  # fmt: skip
        monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", asked)
        monkeypatch.setattr(threading, "get_intra_op_parallelism_threads", lambda told=told: told)
        assert workdirs.threads() == wanted


# Cuts among equal scores.


def test_a_cut_among_equal_scores_is_said_in_every_recipe(tmp_path, recwarn, monkeypatch):
    def flat(model, kernels, batches=None):
        return {name: np.zeros(np.shape(kernel), np.float32) for name, kernel in kernels.items()}

    monkeypatch.setitem(SCORERS._entries, "magnitude", flat)
    few = {"train_steps": 20, "eval_every": 20, "controls": (), "control_levels": ()}
    imp(spec(**few, levels=1, scope="layerwise"), tmp_path / "imp", DIGITS)
    one_shot(pick(**few, scorer="magnitude", density=(0.2,), scope="layerwise"),
             tmp_path / "one_shot", DIGITS, score_only=True)  # fmt: skip
    said = [str(w.message) for w in recwarn if "equal scores" in str(w.message)]
    assert len(said) == 2 and all(text.startswith("level 1: the cut falls among ") for text in said)
    assert "fc1/kernel (1,280)" in said[0] and "fc1/kernel (1,280)" in said[1]
