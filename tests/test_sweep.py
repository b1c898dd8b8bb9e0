"""Sweeps and trunks: what a grid is, what is done when, and that a shared training is the same."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
from test_tools import run as run_tool

from lth_tf import datasets, distribute, experiments, flags, storage, sweeps
from lth_tf.analysis.summary import FLOPS, columns, read_csv
from lth_tf.distribute.shares import slow_bfloat16
from lth_tf.errors import UserError
from lth_tf.experiments import trunk
from lth_tf.spec import Spec, fields_of
from lth_tf.sweeps import processes, runs
from lth_tf.sweeps.grid import shard_of, words_of
from lth_tf.sweeps.processes import gpu_share, gpus
from lth_tf.tickets import load_ticket, save_trained

DIGITS = datasets.load("digits")
NETWORK = {
    "dataset": "digits", "model": "lenet_20_10", "validation_size": 100, "train_steps": 20,
    "eval_every": 10, "batch_size": 30, "compile": "off",
}  # fmt: skip
WORDS = tuple(f"--{name}={value}" for name, value in NETWORK.items())
IMP = Spec(**NETWORK, levels=1, rewind_step=5, controls=("reinit",), prune_fraction=0.5)
PICKED = Spec(
    **NETWORK, recipe="one_shot", scorer="snip", density=(0.5,), samples_per_class=3, dense=True
)
FILES = ("metrics.csv", "rewind.safetensors", "trained.safetensors")


def contents(workdir):
    """File -> its bytes, or its rows without the seconds; without what TensorBoard reads."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.is_dir() or "tensorboard" in name or path.name == ".lock":
            continue
        if path.suffix == ".csv":
            found[name] = [{**row, "seconds": None} for row in read_csv(path)]
        elif path.name == "summary.json":
            found[name] = [{**row, "seconds": None} for row in json.loads(path.read_text())]
        else:
            found[name] = path.read_bytes()
    return found


# Trunks


@pytest.fixture(scope="module")
def trunks(tmp_path_factory):
    """Recipe -> workdir of a trunk for IMP or PICKED."""
    folder = tmp_path_factory.mktemp("trunks")
    for spec in (IMP, PICKED):
        experiments.imp(trunk.spec(spec), folder / spec.recipe, DIGITS)
    return {spec.recipe: folder / spec.recipe for spec in (IMP, PICKED)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize("spec", [IMP, PICKED], ids=lambda spec: spec.recipe)
def test_a_run_with_a_trunk_ends_as_without_one(spec, trunks, tmp_path):
    recipe, level = experiments.run, "replicate_00/level_00"
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    recipe(spec, alone, DIGITS)
    recipe(spec, shared, DIGITS, trunk=trunks[spec.recipe])
    calm, taken = contents(alone), contents(shared)
    assert calm.keys() == taken.keys() and len(calm) >= 8
    assert (f"{level}/rewind.safetensors" in calm) == (spec.recipe == "imp")
    assert not [name for name in calm if calm[name] != taken[name]]
    # It was taken, not trained again, and with its logs.
    for there in (trunks[spec.recipe] / level).rglob("*"):
        if there.name == "trained.safetensors" or there.parent.name == "tensorboard":
            assert there.samefile(shared / there.relative_to(trunks[spec.recipe]))
    assert list((shared / level / "tensorboard").iterdir())


def dense(workdir, **changes):
    """The dense ticket of an IMP experiment like a workdir's, made without training."""
    ticket = load_ticket(workdir / "replicate_00" / "level_00" / "ticket.safetensors")
    spec = distribute.resolve(dataclasses.replace(IMP, **changes))
    return dataclasses.replace(ticket, spec=spec)


def test_take_copies_where_it_cannot_link(trunks, tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "old").touch()
    (tmp_path / "metrics.csv").write_text("of a training that was interrupted")
    assert trunk.take(trunks["imp"], tmp_path, dense(trunks["imp"]), FILES)
    source = trunks["imp"] / "replicate_00" / "level_00"
    for name in ("metrics.csv", "trained.safetensors"):
        assert (tmp_path / name).read_bytes() == (source / name).read_bytes()
        assert not (tmp_path / name).samefile(source / name)
    assert {p.name for p in (tmp_path / "tensorboard").iterdir()} == {
        p.name for p in (source / "tensorboard").iterdir()
    }
    assert {p.name for p in tmp_path.iterdir()} == {*FILES, "tensorboard"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 0.5}, "learning_rate is 0.0012 there, 0.5 here"),
        ({"rewind_step": 6}, "rewind_at is 5 there, 6 here"),
        (
            {"seed": 3, "precision": "float64"},
            "seed is 0 there, 3 here; precision is 'float32' there, 'float64' here",
        ),
    ],
)
def test_a_trunk_that_does_not_fit_says_why(trunks, tmp_path, changes, message):
    with pytest.raises(UserError, match="is no trunk of this experiment: .*" + message):
        trunk.take(trunks["imp"], tmp_path, dense(trunks["imp"], **changes), FILES)
    assert not list(tmp_path.iterdir())


def test_other_initial_weights_are_no_trunk(trunks, tmp_path):
    ticket = dense(trunks["imp"])
    other = dataclasses.replace(ticket, origin={**ticket.origin, "initial_sha256": "0" * 64})
    with pytest.raises(UserError, match="initial_sha256 is '"):
        trunk.take(trunks["imp"], tmp_path, other, FILES)


def test_a_trunk_that_is_not_finished_is_not_taken(trunks, tmp_path):
    ticket, work = dense(trunks["imp"]), tmp_path / "trunk"
    shutil.copytree(trunks["imp"], work)
    level, here = work / "replicate_00" / "level_00", tmp_path / "here"
    second = dataclasses.replace(ticket, origin={**ticket.origin, "replicate": 1})
    assert not trunk.take(work, here, second, FILES)
    for name in ("rewind.safetensors", "trained.safetensors", "ticket.safetensors"):
        (level / name).unlink()
        assert not trunk.take(work, here, ticket, FILES)
    assert not here.exists()
    with pytest.raises(UserError, match="there is no trunk"):
        trunk.take(tmp_path / "nowhere", here, ticket, FILES)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("empty", {}, "is not the workdir of an experiment: there is no spec.json"),
        ("imp", {"learning_rate": 0.5}, "is no trunk of this experiment: learning_rate is 0.0012"),
        ("picked", {}, "is no trunk: its experiment trains no dense network"),
        ("work", {}, "is the workdir itself"),
    ],
)
def test_a_folder_that_is_no_trunk_is_refused_before_anything_is_done(
    trunks, tmp_path, name, changes, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "picked").mkdir()
    experiments.write_spec(tmp_path / "picked", dataclasses.replace(PICKED, dense=False))
    given = trunks["imp"] if name == "imp" else tmp_path / name
    spec, work = dataclasses.replace(IMP, **changes), tmp_path / "work"
    if name == "work":
        work.mkdir()
    with pytest.raises(UserError, match=message):
        experiments.imp(spec, work, DIGITS, trunk=given)
    assert not work.exists() or not list(work.iterdir())
    with pytest.raises(UserError, match="has no meaning for an experiment that trains no dense"):
        plain = dataclasses.replace(PICKED, dense=False)
        experiments.one_shot(plain, work, DIGITS, trunk=trunks["one_shot"])


@pytest.mark.parametrize("name", ["metrics.csv", "trained.safetensors"])
def test_a_trunk_with_an_exchanged_file_is_not_taken(trunks, tmp_path, name):
    work, here = tmp_path / "trunk", tmp_path / "here"
    shutil.copytree(trunks["imp"], work)
    of_another = trunks["one_shot"] / "replicate_00" / "level_00" / name
    if name == "metrics.csv":  # that training is the same but for its number of steps' captures
        text = of_another.read_text()
        (work / "replicate_00" / "level_00" / name).write_text(text.replace("0.", "0.1", 3))
    else:
        ticket = dataclasses.replace(dense(work), rewind_step=5)
        save_trained(work / "replicate_00" / "level_00" / name, ticket.weights, ticket)
    with pytest.raises(UserError, match="put (that|the) one back"):
        trunk.take(work, here, dense(work), FILES)
    assert not here.exists()


def test_a_damaged_trunk_is_not_taken(trunks, tmp_path):
    work, here = tmp_path / "trunk", tmp_path / "here"
    shutil.copytree(trunks["imp"], work)
    path = work / "replicate_00" / "level_00" / "trained.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="was altered"):
        trunk.take(work, here, dense(work), FILES)
    assert not here.exists()


@pytest.mark.parametrize(
    "changes, shared",
    [
        ({"scope": "global", "protect": ("fc1/kernel",)}, True),
        ({"levels": 7, "prune_fraction": 0.2, "one_shot": True, "target_density": 0.1}, True),
        ({"controls": ("reinit",), "replicates": 4, "histograms": True}, True),
        ({"retrain": "finetune", "retrain_steps": 3}, True),
        ({"retrain_steps": 15}, False),
        ({"rewind_step": 5}, False),
        ({"model": "lenet_20"}, False),
        ({"seed": 1}, False),
        ({"train_steps": 21}, False),
        ({"eval_every": 5}, False),
        ({"optimizer": "sgd"}, False),
        ({"weight_decay": 1e-4}, False),
        ({"lr_schedule": "steps", "lr_drops": (3,)}, False),
        ({"sync_batch_norm": True}, False),
    ],
)
def test_what_a_dense_training_depends_on(changes, shared):
    one, other = Spec(**NETWORK), Spec(**{**NETWORK, **changes})
    assert (trunk.trunk_fields(one) == trunk.trunk_fields(other)) == shared
    assert (trunk.spec(one).digest() == trunk.spec(other).digest()) == shared
    for spec in (one, other):
        assert trunk.trunk_fields(trunk.spec(spec)) == trunk.trunk_fields(spec)


def test_both_recipes_share_and_every_name_is_a_field():
    assert trunk.spec(PICKED) == trunk.spec(dataclasses.replace(IMP, rewind_step=0.0))
    assert trunk.spec(PICKED) != trunk.spec(IMP)
    assert {"scope", "protect", "density", "rewind_step"} <= set(fields_of(role="masks"))


def test_a_trunks_flags_say_all_of_it():
    for preset in flags.presets():
        words = [f"--preset={preset}"]
        spec = trunk.spec(flags.parse(words, flags.recipe_of(words)))
        assert flags.parse(words_of(spec), "imp") == spec


# Grids


def names(*axes, passed=()):
    return [run.name for run in sweeps.grid(*axes, passed).runs]


def test_names_have_the_axes_that_are_given():
    assert names(None, None, None, None, passed=WORDS) == ["run"]
    assert names(["digits_lenet_imp"], ["0"], None, None) == ["digits_lenet_imp-seed0"]
    assert names(None, ["0", "1"], ["0.1"], ["snip", "random"], passed=WORDS) == [
        "snip-density0.1-seed0", "snip-density0.1-seed1",
        "random-density0.1-seed0", "random-density0.1-seed1",
    ]  # fmt: skip


def test_any_flag_may_be_an_axis():
    words = ["--dataset=digits", "--model=lenet_9_7"]
    vary = ["method=set,rigl", "update_every=50, 100"]
    found = sweeps.grid(None, ["3"], ["0.1"], None, words, vary)
    assert [run.name for run in found.runs][:2] == [
        "methodset-update_every50-density0.1-seed3", "methodset-update_every100-density0.1-seed3"
    ]  # fmt: skip
    assert {run.tool for run in found.runs} == {"lth-sparse"} and len(found.runs) == 4
    last = found.runs[-1].spec
    assert (last.method, last.update_every, last.seed) == ("rigl", 100, 3)
    assert last.density == (0.1,)


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        (["update_every"], "--vary=update_every is not FLAG=VALUE,VALUE"),
        (["update_every="], "is not FLAG=VALUE,VALUE"),
        (["update_every=5,5"], "with different values"),
        (["update_every=5", "update_every=6"], "of one flag"),
        (["preset=../x"], "is not FLAG=VALUE,VALUE"),
        (["updat_every=5"], "run 'updat_every5-seed0': .*updat_every"),
        (["update_every=five"], "'five' is not a whole number"),
        (["seed=1,2"], "--vary=seed=... is an axis of the grid already"),
        (["levels=1,2", "update_every=5"], "flags of both recipes"),
        (["init=glorot_normal"], "--init is given after --"),
    ],
)
def test_axes_that_are_none_are_said(vary, said):
    with pytest.raises(UserError, match=said):
        sweeps.grid(None, ["0"], None, None, ["--init=glorot_normal"], vary)


def test_a_presets_flags_decide_its_recipe(tmp_path):
    file = tmp_path / "mine.flags"
    file.write_text("--dataset=digits\n--compression=20\n")
    grid = sweeps.grid(
        ["fashion_lenet5_imp", "fashion_lenet5_oneshot", str(file)], ["4"], None, None
    )
    assert [run.tool for run in grid.runs] == ["lth-imp", "lth-oneshot", "lth-oneshot"]
    assert [run.preset for run in grid.runs][2] == "mine" and grid.runs[2].name == "mine-seed4"
    assert grid.runs[2].spec.density == (0.05,) and grid.runs[2].spec.scope == "global"
    imp, picked = sweeps.grid(
        ["fashion_lenet5_imp", "fashion_lenet5_oneshot"], None, ["0.1"], None
    ).runs
    assert (imp.spec.target_density, picked.spec.density) == (0.1, (0.1,))
    (run,) = sweeps.grid(None, None, None, ["synflow"], WORDS).runs
    assert run.spec == Spec(recipe="one_shot", scope="global", scorer="synflow", **NETWORK)


@pytest.mark.parametrize(
    "axes, passed, message",
    [
        ((["digits_lenet_impp"], None, None, None), (), "Did you mean 'digits_lenet_imp'"),
        ((None, ["0", "x"], None, None), (), "run 'seedx': flag --seed=x: 'x' is not a whole"),
        ((None, None, ["0.1", "2"], ["snip"]), (), "run 'snip-density2': density 2.0 is out of"),
        ((None, None, None, ["snip", "grsp"]), (), "run 'grsp': .*Did you mean 'grasp'"),
        ((None, ["0"], None, None), ("--train_stps=3",), "run 'seed0': .*train_stps"),
        ((None, ["0"], None, None), ("stray",), "run 'seed0': unexpected 'stray'"),
        ((None, ["0"], None, None), ("--workdir=x",), "run 'seed0': Unknown .*workdir"),
        ((None, ["0"], None, None), ("--levels=2", "--dense"), "several recipes: .*dense.*levels"),
        ((["digits_lenet_imp"], None, None, ["snip"]), (), "--scorers are for lth-oneshot"),
        ((None, ["0"], None, None), ("--seed=3",), "--seed is given after --"),
        ((None, None, ["0.1"], None), ("--compression=3",), "--compression is given after --"),
        ((None, [], None, None), (), "--seeds= must name different values"),
        ((None, ["1", "1"], None, None), (), "--seeds=1,1 must name different values"),
        ((None, None, ["0.1", "0.10"], None), (), "'density0.1' and 'density0.10' are the same"),
        ((["{file}"], None, ["0.1"], None), (), "--compression, which overrules --densities"),
    ],
)
def test_a_mistake_dies_at_once_with_the_runs_name(tmp_path, axes, passed, message):
    (tmp_path / "a.flags").write_text("--compression=20\n")
    if axes[0] == ["{file}"]:
        axes = ([str(tmp_path / "a.flags")], *axes[1:])
    with pytest.raises(UserError, match=message):
        sweeps.grid(*axes, passed)


def test_two_runs_or_more_share_a_trunk():
    grid = sweeps.grid(None, ["0", "1"], ["0.5", "0.2"], None, [*WORDS, "--replicates=3"])
    assert len(grid.trunks) == 2 and grid.saved == 6
    of = {run.name: run.trunk for run in grid.runs}
    assert of["density0.5-seed0"] == of["density0.2-seed0"] != of["density0.5-seed1"]
    assert {each.spec.replicates for each in grid.trunks.values()} == {3}
    assert not sweeps.grid(None, ["0", "1"], None, None, WORDS).trunks
    picked = [*WORDS, "--samples_per_class=3"]
    assert not sweeps.grid(None, None, None, ["snip", "random"], picked).trunks
    grid = sweeps.grid(None, None, None, ["snip", "random"], [*picked, "--dense"])
    assert len(grid.trunks) == 1 and all(run.trunk in grid.trunks for run in grid.runs)


def slurm(task, first, last, count):
    values = zip(("ID", "MIN", "MAX", "COUNT"), (task, first, last, count), strict=True)
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values}


def test_shards():
    assert shard_of(None, {}) == (1, 1) and shard_of("3/3", slurm(0, 0, 9, 10)) == (3, 3)
    assert [shard_of(None, slurm(task, 0, 3, 4)) for task in range(4)] == [
        (1, 4), (2, 4), (3, 4), (4, 4)
    ]  # fmt: skip
    assert shard_of(None, slurm(7, 1, 7, 3)) == (3, 3)  # --array=1-7:3
    assert shard_of(None, slurm(5, 5, 5, 1)) == (1, 1)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2", ""):
        with pytest.raises(UserError, match="is not i/n with i from 1 to n"):
            shard_of(text, {})
    with pytest.raises(UserError, match="no evenly spaced range"):
        shard_of(None, slurm(3, 1, 8, 3))  # --array=1,3,8


def test_gpus_are_shared_out_in_equal_parts():
    def shares(found, jobs):
        each = [gpu_share(found, slot, jobs) for slot in range(jobs)]
        return [share.get("CUDA_VISIBLE_DEVICES") for share in each], each

    assert shares([], 3)[0] == [None] * 3 and gpu_share(["0", "1"], 0, 1) == {}
    assert shares(["0", "1", "2", "3"], 2)[0] == ["0,1", "2,3"]
    assert shares(["4", "6", "7"], 2)[0] == ["4", "6"]
    assert shares(["4", "6"], 3)[0] == ["4", "6", "4"]
    assert all("TF_FORCE_GPU_ALLOW_GROWTH" in share for share in shares(["4", "6"], 3)[1])
    assert not any("TF_FORCE_GPU_ALLOW_GROWTH" in share for share in shares(["4", "6"], 2)[1])
    assert gpus({"CUDA_VISIBLE_DEVICES": "3, 5,-1,6"}) == ["3", "5"]
    assert gpus({"CUDA_VISIBLE_DEVICES": ""}) == gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert isinstance(gpus({}), list)


# What is done when: the command is a cheap one.


@pytest.fixture
def run_sweep(tmp_path, monkeypatch):
    """Runs a grid whose processes are Python scripts; returns the exit code and what was said."""
    monkeypatch.setattr(processes, "POLL", 0.02)

    def run(grid, script="", **options):
        def command(run, workdir, data_dir):
            said.append(["command", run.name])
            code = "import os, pathlib, signal, sys, time\n" + "name, folder = sys.argv[1:]\n"
            return [sys.executable, "-S", "-c", code + script, run.name, str(workdir / run.folder)]

        said = []
        code = sweeps.sweep(grid, tmp_path / "work", command=command, say=said.append, **options)
        started = [each[1] for each in said if isinstance(each, list)]
        return code, "\n".join(each for each in said if isinstance(each, str)), started

    run.work = tmp_path / "work"
    return run


def states(work):
    return {run["name"]: run["status"] for run in json.loads((work / "index.json").read_text())}


def apart(count):
    """A grid of runs that share nothing."""
    return sweeps.grid(None, [str(seed) for seed in range(count)], None, None, WORDS)


@pytest.mark.parametrize("jobs", [1, 2])
def test_so_many_at_a_time(run_sweep, jobs):
    meet = (
        "here = pathlib.Path(folder); (here / 'here').touch(); began = time.monotonic()\n"
        f"while len(list(here.parent.glob('*/here'))) < {jobs}: time.sleep(0.01)\n"
        "time.sleep(0.1); (here / 'times').write_text(f'{began} {time.monotonic()}')"
    )
    code, said, started = run_sweep(apart(3), meet, jobs=jobs)
    assert code == 0 and len(started) == 3 and "3 finished" in said
    times = [
        tuple(map(float, path.read_text().split())) for path in run_sweep.work.glob("runs/*/times")
    ]
    assert max(sum(a <= began < b for a, b in times) for began, _ in times) == jobs


def test_a_failed_run_is_reported_and_the_others_go_on(run_sweep):
    fail = (
        "print('a line'); print('error: no luck', file=sys.stderr, flush=True)\n"
        "print('and a last line')\n"
        "sys.exit(3 * (name == 'seed1'))"
    )
    code, said, started = run_sweep(apart(3), fail)
    assert code == 1 and started == ["seed0", "seed1", "seed2"]
    log = run_sweep.work / "runs" / "seed1" / "log.txt"
    assert f"failed: runs/seed1: error: no luck; log: {log}" in said
    assert states(run_sweep.work) == {
        "seed0": "finished", "seed1": "failed", "seed2": "finished"
    }  # fmt: skip
    record = json.loads(log.with_name("run.json").read_text())
    assert (record["exit_code"], record["error"]) == (3, "error: no luck")
    assert record["seconds"] > 0 and record["command"] == ["lth-imp", *WORDS, "--seed=1"]
    rows = {row["run"]: row for row in read_csv(run_sweep.work / "index.csv")}
    assert rows["seed1"]["error"] == "error: no luck" and rows["seed2"]["seed"] == 2
    # Again, with a run more: what is finished is left alone.
    code, said, started = run_sweep(apart(4))
    assert code == 0 and started == ["seed1", "seed3"] and "4 finished" in said
    assert "error: no luck" in log.read_text()
    code, said, started = run_sweep(apart(4), "sys.exit(1)")
    assert code == 0 and not started and "4 run(s): 0 to do" in said


def test_a_run_that_was_killed_is_failed_and_says_by_what(run_sweep):
    code, said, _ = run_sweep(apart(1), "print('at it', flush=True); os.kill(os.getpid(), 9)")
    assert code == 1 and "runs/seed0: killed by SIGKILL; before: at it" in said


def test_shards_do_each_their_part(run_sweep):
    assert run_sweep(apart(5), shard=(2, 3))[2] == ["seed1", "seed4"]
    found = states(run_sweep.work)
    assert list(found.values()).count("waiting") == 3 and found["seed4"] == "finished"
    assert run_sweep(apart(5), shard=(3, 3))[2] == ["seed2"]
    assert run_sweep(apart(5))[2] == ["seed0", "seed3"]


def shared_by(*densities):
    return sweeps.grid(None, None, densities, None, WORDS)


def test_a_trunk_comes_first_and_once(run_sweep):
    check = (
        "import json\n"
        "if name.startswith('density'):\n"
        "    path, = (pathlib.Path(folder).parents[1] / 'trunks').glob('*/run.json')\n"
        "    sys.exit(json.loads(path.read_text())['status'] != 'finished')"
    )
    code, said, started = run_sweep(shared_by("0.5", "0.2"), check, jobs=3)
    assert code == 0 and len(started) == 3 and started[0].startswith("trunks/"), said
    assert run_sweep(shared_by("0.5", "0.2", "0.1"), check)[2] == ["density0.1"]
    assert set(states(run_sweep.work)) == {"density0.5", "density0.2", "density0.1"}


def test_a_trunk_with_more_replicates_is_done_again(run_sweep):
    more = sweeps.grid(None, None, ["0.4", "0.3"], None, [*WORDS, "--replicates=2"])
    assert len(run_sweep(shared_by("0.5", "0.2"))[2]) == 3
    assert next(iter(more.trunks)) == next(iter(shared_by("0.5", "0.2").trunks))
    assert len(run_sweep(more)[2]) == 3


def test_runs_whose_trunk_failed_are_not_started(run_sweep):
    code, said, started = run_sweep(shared_by("0.5", "0.2"), "print('error: sad'); sys.exit(1)")
    assert code == 1 and len(started) == 1
    assert "failed: runs/density0.2: its trunk failed: error: sad; log: " in said
    assert set(states(run_sweep.work).values()) == {"failed"}


def test_a_run_that_another_process_is_at_is_left_to_it(run_sweep):
    for lock in (run_sweep.work / "runs/seed1/.sweep", run_sweep.work / "runs/seed1"):
        with storage.lock(lock):
            code, said, started = run_sweep(apart(2))
            assert code == 0 and "seed1" not in started
            assert "seed1: left to another process" in said
    assert run_sweep(apart(2))[2] == ["seed1"]


@pytest.mark.parametrize("status", ["finished", "failed", "interrupted"])
def test_a_trunk_that_another_process_trains_is_waited_for(run_sweep, status):
    grid, held = shared_by("0.5", "0.2"), threading.Event()
    (each,) = grid.trunks.values()

    def other():
        with storage.lock(run_sweep.work / each.folder / ".sweep"):
            held.set()
            time.sleep(0.5)
            runs.record(run_sweep.work, each, status, error="error: there")

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    code, said, started = run_sweep(grid)
    thread.join()
    assert said.count("waiting for another process") == 1
    if status == "failed":
        assert code == 1 and not started and "its trunk failed: error: there" in said
    else:
        trained = [each.folder] if status == "interrupted" else []
        assert code == 0 and started == [*trained, "density0.5", "density0.2"]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"status": "finished"}', "[" * 9000, "\xff", "another run's"]
)
def test_a_damaged_record_of_one_run_does_not_stop_the_sweep(run_sweep, text):
    run_sweep(apart(2))
    folder = run_sweep.work / "runs"
    whole = (folder / "seed1" / "run.json").read_text()
    text = whole if text == "another run's" else text
    (folder / "seed0" / "run.json").write_bytes(text.encode("latin-1"))
    runs.write_index(run_sweep.work)
    assert states(run_sweep.work) == {"seed0": "damaged", "seed1": "finished"}
    code, said, started = run_sweep(apart(3))
    assert code == 0 and started == ["seed0", "seed2"]
    assert said.count("seed0: begun again, and goes on from what is finished: ") == 1
    assert set(states(run_sweep.work).values()) == {"finished"}
    assert (folder / "seed1" / "run.json").read_text() == whole


def test_a_folder_of_another_command_is_refused_before_anything_runs(run_sweep):
    run_sweep(apart(1))
    other = sweeps.grid(None, ["7", "0"], None, None, [*WORDS, "--learning_rate=0.5"])
    with pytest.raises(UserError, match="'.*/runs/seed0' belongs to another command .*"
                       "learning_rate is 0.0012 there, 0.5 here"):  # fmt: skip
        run_sweep(other)
    assert list(states(run_sweep.work)) == ["seed0"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_waited_for(run_sweep, number, code):
    """As a job scheduler or a terminal sends it; the second run is not begun."""
    save = (
        "def save(*_):\n"
        "    time.sleep(0.3); (pathlib.Path(folder) / 'checkpoint').touch()\n"
        f"    sys.exit({code})\n"
        f"signal.signal({int(number)}, save)\n"
        f"os.kill(os.getppid(), {int(number)})\n"
        "time.sleep(20)"
    )
    before = signal.getsignal(number)
    ended, said, started = run_sweep(apart(2), save)
    assert ended == code and started == ["seed0"] and "seed0: interrupted after" in said
    assert (run_sweep.work / "runs" / "seed0" / "checkpoint").exists()
    assert states(run_sweep.work) == {"seed0": "interrupted", "seed1": "waiting"}
    assert signal.getsignal(number) is before
    assert run_sweep(apart(2))[2] == ["seed0", "seed1"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, -9)])
def test_ctrl_c_twice_kills(run_sweep, number, code):
    """But not SIGTERM, which a scheduler may repeat."""
    stubborn = (
        f"signal.signal({int(number)}, signal.SIG_IGN)\n"
        f"for _ in range(2): os.kill(os.getppid(), {int(number)}); time.sleep(0.3)"
    )
    assert run_sweep(apart(1), stubborn)[0] == 128 + number
    record = json.loads((run_sweep.work / "runs" / "seed0" / "run.json").read_text())
    assert record["exit_code"] == code
    assert record["status"] == ("interrupted" if code else "finished")


def test_jobs_get_their_share_of_the_gpus(run_sweep):
    say = "(pathlib.Path(folder) / 'gpu').write_text(os.environ.get('CUDA_VISIBLE_DEVICES', '-'))"
    assert run_sweep(apart(3), say + "; time.sleep(0.4)", jobs=2, found=["3", "5"])[0] == 0
    found = [(run_sweep.work / f"runs/seed{i}/gpu").read_text() for i in range(3)]
    assert found[:2] == ["3", "5"] and found[2] in ("3", "5")


# From end to end, in processes of their own.


@pytest.mark.slow
def test_a_sweep_from_end_to_end(tmp_path, monkeypatch, capsys):
    """Two recipes that share a trunk, and a run that fails."""
    for name, own in {
        "picked": ["--scorer=snip", "--samples_per_class=3", "--density=0.5", "--dense"],
        "pruned": ["--levels=1", "--prune_fraction=0.5"],
        "broken": ["--levels=1", "--batch_size=5000"],
    }.items():
        (tmp_path / f"{name}.flags").write_text("\n".join([*WORDS, *own]) + "\n")
    presets = [str(tmp_path / f"{name}.flags") for name in ("picked", "pruned", "broken")]
    work = tmp_path / "work"
    words = [f"--presets={','.join(presets)}", "--jobs=2", f"--workdir={work}"]
    passed = ["--", "--train_steps=12"]
    code, out, _ = run_tool(monkeypatch, capsys, *words, "--plan", *passed, name="sweep")
    assert code == 0 and not work.exists()
    for text in ("dense, for 2 runs", "lth-oneshot", "trunks save 1 dense training(s)"):
        assert text in out, text
    code, out, err = run_tool(monkeypatch, capsys, *words, *passed, name="sweep")
    message = "error: batch_size 5000 exceeds the 1337 training examples"
    assert code == 1 and not err, out + err
    assert f"failed: runs/broken: {message}" in out
    assert f"log: {work}/runs/broken/log.txt" in out
    grid = sweeps.grid(presets, None, None, None, ["--train_steps=12"])
    (folder,) = grid.trunks
    first = work / folder / "replicate_00" / "level_00" / "trained.safetensors"
    for run in grid.runs[:2]:
        assert experiments.read_spec(work / run.folder) == distribute.resolve(run.spec)
        taken = work / run.folder / "replicate_00" / "level_00" / "trained.safetensors"
        assert taken.samefile(first)
    rows = read_csv(work / "index.csv")
    assert list(rows[0]) == [*runs.ABOUT, *columns(given=FLOPS), "error"]
    assert [(r["run"], r["method"], r["level"], r["density"]) for r in rows] == [
        ("broken", "imp", None, None), ("picked", "snip", 0, 1.0), ("picked", "snip", 1, 0.5),
        ("pruned", "imp", 0, 1.0), ("pruned", "imp", 1, 0.5),
    ]  # fmt: skip
    assert rows[0]["error"].startswith(message) and rows[2]["steps"] == 12
    assert rows[1]["test_accuracy_end"] == rows[3]["test_accuracy_end"] is not None
    index = json.loads((work / "index.json").read_text())
    assert [len(run["results"]) for run in index] == [0, 2, 2]
    # Whoever starts it again does what failed only.
    said = []
    sweeps.sweep(grid, work, command=lambda *_: [sys.executable, "-c", ""], say=said.append)
    assert [line for line in said if "started" in line][0].startswith("broken: started")
    assert len([line for line in said if "started" in line]) == 1


def test_how_runs_are_computed_is_passed_on_and_bounded(monkeypatch):
    monkeypatch.setattr("lth_tf.sweeps.processes.cores", lambda: 8)
    assert sweeps.execution_words(20) == []
    assert sweeps.execution_words(2, "2", "auto") == ["--jobs=2", "--engine=auto", "--threads=2"]
    assert sweeps.execution_words(2, "auto", threads=1) == ["--jobs=4", "--threads=1"]
    assert sweeps.execution_words(9, "auto") == []
    assert sweeps.execution_words(9, compact="off") == ["--compact_training=off"]
    with pytest.raises(UserError, match="are 12 at a time, more than the 8"):
        sweeps.execution_words(3, "4")
    for mistake in ("0", "x", "-1"):
        with pytest.raises(UserError, match="neither a number from 1 on nor 'auto'"):
            sweeps.execution_words(1, mistake)
    with pytest.raises(UserError, match="jobs"):
        sweeps.grid(None, ["1"], None, None, ["--jobs=2"])


@pytest.mark.parametrize(
    "precision, flags, said",
    [
        ("mixed_bfloat16", "fma avx2", True), ("mixed_bfloat16", "avx2 amx_bf16", False),
        ("mixed_bfloat16", "avx512_bf16", False), ("float32", "fma avx2", False),
        ("mixed_bfloat16", None, False),
    ],
)  # fmt: skip
def test_cpus_without_bfloat16_are_told_of(precision, flags, said, tmp_path):
    path = tmp_path / "cpuinfo"
    if flags:
        path.write_text(f"vendor_id : x\nflags\t\t: {flags}\nbugs : amx_bf16\n")
    text = slow_bfloat16(precision, path)
    assert ("several times as long" in text) == said and bool(text) == said
