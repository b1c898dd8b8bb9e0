"""IMP from level to level: nesting, budgets, rewinding, resuming, refusing."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lth_tf import datasets, experiment, masks, pruning, scopes
from lth_tf.analysis.summary import COLUMNS, read_csv
from lth_tf.errors import UserError
from lth_tf.experiment import imp, plan
from lth_tf.spec import Spec
from lth_tf.tickets import load_ticket, load_trained

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


def spec(**changes):
    return dataclasses.replace(BASE, **changes)


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
    assert tuple(rows[0]) == COLUMNS and len(rows) == 2 * (4 + 1)
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
    for distribute in ("none", "mirrored"):
        s = spec(precision="float64", distribute=distribute, train_steps=100, eval_every=50)
        imp(s, tmp_path / distribute, DIGITS)
    for level in range(4):
        one, two = (ticket(tmp_path / d, level) for d in ("none", "mirrored"))
        assert same(one.mask, two.mask)
        for name, w in trained(tmp_path / "none", level).items():
            np.testing.assert_allclose(
                trained(tmp_path / "mirrored", level)[name], w, rtol=1e-8, atol=1e-11
            )


def test_mirrored_float32_accuracy_lies_within_the_spread_of_seeds(tmp_path):
    kwargs = {"train_steps": 300, "eval_every": 50, "levels": 1, "controls": (),
              "control_levels": ()}  # fmt: skip
    seeds = imp(spec(replicates=4, **kwargs), tmp_path / "one", DIGITS)
    two = imp(spec(distribute="mirrored", **kwargs), tmp_path / "two", DIGITS)
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


@pytest.mark.parametrize("name", ["metrics.csv", "rewind.safetensors", "trained.safetensors"])
def test_a_level_that_lost_a_file_is_done_again_alike(tmp_path, name):
    s = spec(levels=1, rewind_step=10, controls=(), control_levels=())
    imp(s, tmp_path, DIGITS)
    before = contents(tmp_path)
    (folder(tmp_path, 0) / name).unlink()
    imp(s, tmp_path, DIGITS)
    assert contents(tmp_path) == before


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
    lab = experiment.Laboratory(s, tmp_path, DIGITS)
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
    return experiment.Ticket(mask, weights, 1, 0, {}, BASE)


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


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path):
    """SIGKILL when the n-th file has appeared, for several n, then to the end."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command(tmp_path / "calm"), check=True, **quiet)
    kills = 0
    for files in (3, 8, 13):
        process = subprocess.Popen(command(tmp_path / "killed"), **quiet)
        while process.poll() is None:
            if len(list((tmp_path / "killed").rglob("*.safetensors"))) >= files:
                # In the middle of the next training or of a file being written.
                time.sleep(0.013 * files)
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
    assert kills == 3
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("trained.safetensors")}
    subprocess.run(command(tmp_path / "killed"), check=True, **quiet)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    calm, killed = contents(tmp_path / "calm"), contents(tmp_path / "killed")
    assert calm.keys() == killed.keys() and len(calm) == 30
    assert not [name for name in calm if calm[name] != killed[name]]


def test_second_process_on_a_workdir_is_refused(tmp_path):
    from lth_tf import storage

    with storage.lock(tmp_path):
        with pytest.raises(UserError, match="another process is working in"):
            imp(BASE, tmp_path, DIGITS)
