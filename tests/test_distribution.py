"""One, two and four replicas, and two real workers: the same mathematics, and clear ends."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from test_training import DIGITS, TWO, same, spec, start

from lth_tf import distribute, experiments, masks, pruning, tickets
from lth_tf.analysis.summary import read_csv
from lth_tf.compat import tf
from lth_tf.errors import UserError
from lth_tf.experiments import picking
from lth_tf.scorers import one_shot_mask, score
from lth_tf.spec import Spec
from lth_tf.training import Trainer, plain_model

FOUR = {"distribute": "mirrored", "devices": 4}
REPLICAS = {1: {}, 2: TWO, 4: FOUR}


# The same mathematics.


@pytest.mark.slow
@pytest.mark.parametrize("communication", ["plain", "packed"])
def test_float64_losses_of_one_two_and_four_replicas(communication):
    losses = {}
    for count, changes in REPLICAS.items():
        s = spec(
            precision="float64", batch_size=60, train_steps=100, eval_every=1, validation_size=77,
            weight_decay=1e-3, communication=communication, **changes,
        )  # fmt: skip
        weights, mask = start(s)
        rows = Trainer(s, DIGITS).train(weights, mask, 0, 100).rows
        losses[count] = [[r["loss"] or 0, r["validation_loss"]] for r in rows]
    for count in (2, 4):
        np.testing.assert_allclose(losses[count], losses[1], rtol=1e-10)


@pytest.mark.slow
def test_float64_iterative_pruning_ends_with_the_same_masks(tmp_path):
    found = {}
    for count, changes in REPLICAS.items():
        s = spec(precision="float64", batch_size=60, train_steps=100, eval_every=50, levels=4,
                 scope="global", augmentation="flip_crop", **changes)  # fmt: skip
        experiments.imp(s, tmp_path / str(count), DIGITS)
        paths = sorted((tmp_path / str(count)).rglob("ticket.safetensors"))
        found[count] = [tickets.load_ticket(path).mask for path in paths]
    assert len(found[1]) == 5 and masks.density(found[1][4]) < 0.5
    for count in (2, 4):
        assert all(same(a, b) for a, b in zip(found[1], found[count], strict=True))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("scorer", ["grasp", "snip", "synflow"])
def test_scores_and_masks_do_not_depend_on_the_number_of_devices(scorer, precision):
    """In one process not by a bit: micro-batches stay whole, and are added up in their order."""
    s = Spec(
        recipe="one_shot", dataset="digits", model="conv2", scorer=scorer, precision=precision,
        samples_per_class=7, score_batch_size=15, validation_size=100,
    )  # fmt: skip
    model = plain_model(s, (8, 8, 1), 10, 0)
    data = None if scorer == "synflow" else picking.batches(s, DIGITS, 0)
    options = {"rounds": 2, "density": 0.1, **picking.options(s, 0)}
    found = []
    for changes in REPLICAS.values():
        strategy = distribute.strategy_of(dataclasses.replace(s, **changes, batch_size=60))
        with distribute.scoring(strategy):
            scores = score(model, scorer, data, **picking.options(s, 0))
            found.append((scores, one_shot_mask(model, scorer, data, **options)))
    assert data is None or len(data) == 5  # which neither two nor four divide
    for scores, mask in found[1:]:
        assert same(scores, found[0][0]) and same(mask, found[0][1])


def test_a_strategys_own_scope_gives_scorers_its_devices(monkeypatch):
    used = []
    device = tf.device
    monkeypatch.setattr(tf, "device", lambda name: used.append(name) or device(name))
    s = Spec(recipe="one_shot", dataset="digits", model="lenet_20_10", scorer="snip",
             samples_per_class=4, score_batch_size=10, validation_size=100)  # fmt: skip
    model = plain_model(s, (8, 8, 1), 10, 0)
    with distribute.strategy_of(spec(**TWO)).scope():
        score(model, "snip", picking.batches(s, DIGITS, 0))
    assert {str(name)[-5:] for name in used if name} >= {"CPU:0", "CPU:1"}


def test_float32_gradient_of_one_step_on_four_replicas():
    changes = {"optimizer": "sgd", "learning_rate": 1.0, "batch_size": 60, "weight_decay": 0.01}
    before, mask = start(spec())
    after = {
        count: Trainer(spec(**changes, **REPLICAS[count]), DIGITS).train(before, mask, 0, 1).weights
        for count in (1, 4)
    }
    for name, w in before.items():
        gradient = w - after[1][name]
        wrong = np.abs(after[4][name] - after[1][name]).max()
        # The weights themselves are rounded to 6e-8 of their size.
        assert wrong <= 1e-6 * np.abs(gradient).max() + 1.2e-7 * np.abs(w).max(), name


@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", ["thin_norm", "conv2_dropout"])
def test_every_replica_ends_with_the_same_variables_and_repeats(thin_norm, model):
    s = spec(**TWO, model=model, train_steps=12, eval_every=8, precision="mixed_bfloat16",
             weight_decay=1e-3, communication="packed")  # fmt: skip
    weights, mask = start(s)
    ends = []
    for _ in range(2):
        trainer = Trainer(s, DIGITS)
        ends.append(trainer.train(weights, mask, 0, 12).weights)
        for variable in (*trainer.model.variables, *trainer.optimizer.variables):
            copies = [copy.numpy() for copy in variable.values]
            if not distribute.is_own(variable):
                assert len(copies) == 2 and np.array_equal(*copies), variable.name
    assert same(*ends)
    pruning.check(trainer.model, trainer.optimizer)


def test_dropout_drops_the_same_on_any_number_of_replicas():
    changes = {"model": "conv2_dropout", "precision": "float64", "train_steps": 3, "eval_every": 3}
    weights, mask = start(spec(**changes))
    ends = [
        Trainer(spec(**changes, **REPLICAS[count]), DIGITS).train(weights, mask, 0, 3).weights
        for count in (1, 2)
    ]
    for name, w in ends[0].items():
        np.testing.assert_allclose(ends[1][name], w, rtol=1e-9, atol=1e-13)


@pytest.mark.slow
def test_synchronized_batch_norm_sees_the_global_batch(thin_norm):
    changes = {"model": thin_norm, "precision": "float64", "train_steps": 10, "eval_every": 5}
    weights, mask = start(spec(**changes))

    def rows(**more):
        s = spec(**changes, **more)
        return [r["validation_loss"] for r in Trainer(s, DIGITS).train(weights, mask, 0, 10).rows]

    alone = rows()
    np.testing.assert_allclose(rows(sync_batch_norm=True, **TWO), alone, rtol=1e-9)
    assert not np.allclose(rows(**TWO), alone, rtol=1e-6)


def test_what_is_evaluated_is_what_is_saved(thin_norm):
    """Each replica has moving statistics of its own; their mean is saved."""
    s = spec(**TWO, model=thin_norm, precision="float64", train_steps=10, eval_every=10)
    weights, mask = start(s)
    trained = Trainer(s, DIGITS).train(weights, mask, 0, 10)
    one = Trainer(dataclasses.replace(s, distribute="none", devices=None), DIGITS)
    one.train(trained.weights, mask, 0, 0)
    assert one.evaluate("test")[0] == pytest.approx(trained.rows[-1]["test_loss"], rel=1e-12)


# Which devices.


def test_auto_is_none_where_there_is_no_gpu_and_says_so_in_the_spec():
    found = distribute.resolve(Spec())
    assert (found.distribute, found.devices) == ("none", None)
    assert distribute.resolve(spec(distribute="mirrored", batch_size=60)).devices == 4
    assert distribute.resolve(Spec(devices=1)).distribute == "none"


@pytest.mark.skipif(
    len(tf.config.list_physical_devices("GPU")) < 2, reason="needs two GPUs, which are not here"
)
def test_auto_takes_all_gpus_and_trains():
    s = spec(batch_size=60 * len(tf.config.list_physical_devices("GPU")))
    trainer = Trainer(s, DIGITS)
    assert all("GPU" in device for device in trainer.strategy.extended.worker_devices)
    weights, mask = start(s)
    assert trainer.train(weights, mask, 0, 20).rows[-1]["loss"] < 3


@pytest.mark.slow
def test_two_devices_of_a_machine_without_gpus_are_made_by_the_command(tmp_path):
    flags = [*ALIKE[:-1], "--levels=1", "--train_steps=20", "--communication=packed"]
    done = subprocess.run(
        [sys.executable, "-m", "lth_tf.tools.imp", "--distribute=mirrored", "--devices=2",
         f"--workdir={tmp_path}", *flags],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 replicas share each batch of 60" in done.stdout
    sent = [int(n.replace(",", "")) for n in re.findall(r"gives ([0-9,]+) bytes", done.stdout)]
    mask = tickets.load_ticket(next(tmp_path.rglob("level_01/ticket.safetensors"))).mask
    others = 64 + 32 + 10 + 1  # biases, and the loss
    assert sent == [8 * (masks.size(mask) + others), 8 * (masks.kept(mask) + others)]


# Workers: real processes.

ALIKE = [
    "--dataset=digits", "--model=lenet_64_32", "--validation_size=200", "--batch_size=60",
    "--eval_every=100", "--compile=off", "--precision=float64", "--worker_timeout=30",
]  # fmt: skip
IMP = [*ALIKE, "--levels=2", "--train_steps=300", "--checkpoint_every=50", "--rewind_step=40"]
PICK = [
    *ALIKE, "--scorer=grasp", "--density=0.1", "--train_steps=50", "--samples_per_class=7",
    "--score_batch_size=30", "--controls=invert",
]  # fmt: skip


def ports(count):
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return found


def begin(tool, flags, workdir, count=2):
    """Starts that many workers of lth-imp or lth-oneshot, or of Python with these arguments."""
    addresses = [f"127.0.0.1:{port}" for port in ports(count)]
    processes = []
    for index in range(count):
        config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        words = [f"--workdir={workdir}", "--distribute=multi_worker", *flags]
        words = [*(["-m", f"lth_tf.tools.{tool}"] if isinstance(tool, str) else tool), *words]
        processes.append(
            subprocess.Popen(
                [sys.executable, *words],
                env={**os.environ, "TF_CONFIG": json.dumps(config)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    return processes


def ended(processes, within=90):
    """Exit codes, and what each wrote to stdout and stderr."""
    try:
        told = [process.communicate(timeout=within) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], told


def contents(workdir):
    """Tickets and trained weights, byte for byte."""
    return {str(p.relative_to(workdir)): p.read_bytes() for p in workdir.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("workers") / "imp"
    codes, told = ended(begin("imp", IMP, workdir))
    assert codes == [0, 0], told
    return workdir, told


def alone(recipe, words, workdir):
    from lth_tf import flags

    s = flags.parse([w for w in words if not w.startswith("--worker_timeout")], recipe)
    experiments.run(s, workdir, DIGITS)


def require_same_masks(one, other, count):
    paths = sorted(one.rglob("ticket.safetensors"))
    assert len(paths) == count
    for path in paths:
        mine, theirs = (tickets.load_ticket(p) for p in (path, other / path.relative_to(one)))
        assert same(mine.mask, theirs.mask)


def test_two_workers_end_with_the_masks_of_one_process(two_workers, tmp_path):
    workdir, told = two_workers
    alone("imp", IMP, tmp_path)
    require_same_masks(tmp_path, workdir, 3)
    assert json.loads((workdir / "spec.json").read_text())["workers"] == 2
    assert "early stop at" in told[0][0] and not told[1][0]  # the chief alone reports
    assert not list(workdir.rglob("checkpoint_*"))


@pytest.mark.slow
def test_two_workers_pick_the_masks_of_one_process(two_that_pick, tmp_path):
    workdir, _ = two_that_pick
    alone("one_shot", PICK, tmp_path)
    require_same_masks(tmp_path, workdir, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rigl", "snfs", "granet"])
def test_two_workers_move_the_masks_of_one_process(method, tmp_path):
    words = [*ALIKE, f"--method={method}", "--density=0.1", "--train_steps=60", "--update_every=10",
             "--measure=gradient_flow", "--hessian_at=60"]  # fmt: skip
    codes, told = ended(begin("sparse", words, tmp_path / "two"))
    assert codes == [0, 0], told
    alone("sparse", words, tmp_path / "one")
    require_same_masks(tmp_path / "one", tmp_path / "two", 1)
    folders = [tmp_path / name / "replicate_00" / "level_01" for name in ("one", "two")]
    ends = [
        tickets.solution(f / "trained.safetensors", tickets.load_ticket(f / "ticket.safetensors"))
        for f in folders
    ]
    assert same(ends[0].mask, ends[1].mask)
    for name in ("updates.csv", "hessian.csv", "metrics.csv"):
        one, two = (read_csv(f / name) for f in folders)
        assert len(one) == len(two) > 0
        for row, other in zip(one, two, strict=True):
            for column in row.keys() - {"seconds"}:
                mine, theirs = (-1 if r[column] is None else r[column] for r in (row, other))
                assert mine == pytest.approx(theirs, rel=1e-6), (name, column)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1])
def test_a_worker_that_is_killed_ends_all_and_started_again_they_end_alike(
    two_workers, tmp_path, victim
):
    calm, workdir = two_workers[0], tmp_path / "imp"
    processes = begin("imp", IMP, workdir)
    level = workdir / "replicate_00" / "level_01"
    while not list(level.glob("checkpoint_*")) and processes[0].poll() is None:
        time.sleep(0.01)
    processes[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, told = ended(processes, within=45)
    assert codes == [1, -signal.SIGKILL], told
    assert "level 1 ticket: a worker has ended or does not answer" in told[0][1]
    assert "start the same command on all workers again" in told[0][1]
    assert time.monotonic() - began < 40
    codes, told = ended(begin("imp", IMP, workdir))
    assert codes == [0, 0], told
    assert "level 1 ticket: goes on at step" in told[0][0]
    assert contents(workdir) == contents(calm)


# After lth-oneshot, so that no other processes need to be started.
IN_WORKERS = """
import runpy, sys
try:
    runpy.run_module("lth_tf.tools.one_shot", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code

import numpy as np
from conftest import _thin_norm
from lth_tf import datasets, distribute, masks
from lth_tf.experiments import picking
from lth_tf.analysis.summary import read_csv
from lth_tf.compat import tf
from lth_tf.scorers import one_shot_mask, score
from lth_tf.spec import Spec
from lth_tf.training import plain_model

s = Spec(recipe="one_shot", dataset="digits", model="conv2", samples_per_class=8,
         score_batch_size=16, validation_size=100, distribute="multi_worker")
strategies = distribute.strategy_of(s), tf.distribute.get_strategy()
data, model = picking.batches(s, datasets.load("digits"), 0), plain_model(s, (8, 8, 1), 10, 0)
for scorer in ("grasp", "snip"):
    found = []
    for strategy in strategies:
        with distribute.scoring(strategy):
            found.append(score(model, scorer, data))
            found.append(one_shot_mask(model, scorer, data, density=0.1))
    for name, wanted in found[2].items():
        assert np.abs(found[0][name] - wanted).max() <= 1e-5 * np.abs(wanted).max(), name
    same = sum((found[1][n] == m).sum() for n, m in found[3].items())
    both = sum((found[1][n] & m).sum() for n, m in found[3].items())
    assert same >= 0.999 * masks.size(found[3]) and both >= 0.999 * masks.kept(found[3])
    changed = any((found[0][n] != found[2][n]).any() for n in found[0])
    print(scorer, "was added up in another order" if changed else "was not shared out")

# BatchNormalization's moving statistics are each worker's own.
from lth_tf.models import MODELS
from lth_tf.training import Interrupted, Trainer, initial_weights

MODELS.register("thin_norm")(_thin_norm)
s = Spec(dataset="digits", model="thin_norm", validation_size=100, batch_size=30, train_steps=20,
         eval_every=8, distribute="multi_worker", checkpoint_every=7, optimizer="momentum")
digits = datasets.load("digits")
weights, names = initial_weights(s, (8, 8, 1), 10, 0)
mask = masks.ones({name: weights[name].shape for name in names})
trainer, states = Trainer(s, digits, strategies[0]), []
whole = trainer.train(weights, mask, 0, 20, keep=states.append)
assert sum(name.startswith("replica_1/") for name in states[0].variables) == 2
looks = iter([False, True])
try:
    trainer.train(weights, mask, 0, 20, keep=states.append, asked=lambda: next(looks))
except Interrupted:
    again = Trainer(s, digits, strategies[0]).train(weights, mask, 0, 20, state=states[-1])
assert all((whole.weights[n] == w).all() for n, w in again.weights.items())
trainer.train(whole.weights, mask, 0, 0)
assert abs(trainer.evaluate("test")[0] - whole.rows[-1]["test_loss"]) < 1e-6
print("a state holds both workers' statistics")
sys.stdout.flush()
"""


@pytest.fixture(scope="module")
def two_that_pick(tmp_path_factory):
    """What two workers of lth-oneshot left, and what they printed, who go on in IN_WORKERS."""
    workdir, tests = tmp_path_factory.mktemp("workers") / "picked", os.path.dirname(__file__)
    code = f"import sys; sys.path.insert(0, {tests!r})\n{IN_WORKERS}"
    codes, told = ended(begin(["-c", code], PICK, workdir), within=180)
    assert codes == [0, 0], told
    return workdir, told


@pytest.mark.slow
def test_scores_in_float32_and_batch_norm_of_two_workers(two_that_pick):
    _, told = two_that_pick
    for out, _ in told:
        assert out.count("was added up in another order") == 2
        assert "a state holds both workers' statistics" in out


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"batch_size": 61}, "batch_size 61 cannot be divided among 2 replicas; give a multiple"),
        ({"devices": 2}, "devices 2 are asked for, but of GPUs this machine has none"),
    ],
)
def test_what_keeps_a_worker_from_taking_part_is_told_to_all(monkeypatch, changes, words):
    config = {
        "cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},
        "task": {"type": "worker", "index": 1},
    }
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))

    def meet(here, statement, timeout, problem):
        assert here.index == 1 and timeout == 120 and statement["batch_size"]
        raise UserError(f"worker 1: {problem}")

    monkeypatch.setattr("lth_tf.distribute.meeting.meet", meet)
    with pytest.raises(UserError, match=f"worker 1: {words}"):
        distribute.join(spec(distribute="multi_worker", **changes))


@pytest.mark.slow
def test_a_chief_that_cannot_write_is_an_error_on_every_worker(tmp_path):
    (tmp_path / "file").write_text("in the way")
    began = time.monotonic()
    codes, told = ended(begin("imp", IMP, tmp_path / "file" / "workdir"))
    assert codes == [1, 1] and time.monotonic() - began < 60
    for _, error in told:
        assert "cannot write" in error and "in the way of a folder" in error
        assert "Traceback" not in error


def test_without_a_cluster_several_workers_are_refused(monkeypatch):
    for name in ("TF_CONFIG", "SLURM_JOB_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="nothing says who they are.*launch_local"):
        distribute.resolve(spec(distribute="multi_worker"))


@pytest.mark.parametrize(
    ("jobs", "task", "found"),
    [
        ({"worker": ["a:1", "b:1", "c:1"]}, ("worker", 2), (2, 3)),
        ({"chief": ["a:1"], "worker": ["b:1", "c:1"]}, ("chief", 0), (0, 3)),
        ({"worker": ["b:1", "c:1"], "chief": ["a:1"]}, ("worker", 1), (2, 3)),
        ({}, (None, None), (0, 1)),
        ({"worker": ["a:1", "b:1"], "evaluator": ["c:1"]}, ("evaluator", 0), None),
        ({}, ("worker", 1), None),  # no longer what it was when the strategy was made
    ],
)
def test_a_worker_is_the_one_that_its_cluster_names(jobs, task, found):
    class Strategy(tf.distribute.MultiWorkerMirroredStrategy):
        def __init__(self):  # would connect
            pass

        cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            tf.train.ClusterSpec(jobs), task_type=task[0], task_id=task[1]
        )
        num_replicas_in_sync = found[1] if found else 2
        extended = types.SimpleNamespace(worker_devices=("CPU:0",))

    if found:
        assert distribute.index_and_count(Strategy()) == found
    else:
        with pytest.raises(UserError, match=f"2 replicas.*{task[0]} {task[1]}; leave TF_CONFIG"):
            distribute.index_and_count(Strategy())
    for strategy in (tf.distribute.get_strategy(), distribute.strategy_of(spec(**TWO))):
        assert distribute.index_and_count(strategy) == (0, 1)


def test_a_process_that_has_computed_cannot_join(monkeypatch):
    tf.zeros(1)
    (port,) = ports(1)
    config = {"cluster": {"worker": [f"127.0.0.1:{port}"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(UserError, match="cannot join a cluster any more"):
        distribute.resolve(spec(distribute="multi_worker"))
    with pytest.raises(UserError, match="workers 3 are asked for, but the cluster has 1"):
        distribute.resolve(spec(distribute="multi_worker", workers=3))
