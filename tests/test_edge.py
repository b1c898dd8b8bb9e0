"""The outer edge: what a command meets in its surroundings, and what its users mistype."""

import contextlib
import inspect
import io
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_tools import NETWORK, TINY, run

import lth_tf
from lth_tf import (
    analysis,
    callbacks,
    compat,
    datasets,
    edge,
    experiments,
    exporters,
    models,
    pruning,
    tickets,
    training,
)
from lth_tf.compat import keras, tf
from lth_tf.errors import UserError
from lth_tf.experiments import laboratory
from lth_tf.pruning import InvariantError
from lth_tf.scopes import SCOPES
from lth_tf.scorers import one_shot_mask, score
from lth_tf.spec import Spec
from lth_tf.training import checkpoints

# --- What the edge says ---


@pytest.mark.parametrize(
    "error, text, code",
    [
        (UserError("levels is wrong"), "error: levels is wrong", 1),
        (InvariantError("3 are not zero"), "error: 3 are not zero", 1),
        (PermissionError(13, "Permission denied", "/x"), "error: '/x' cannot be used (Permis", 1),
        (OSError(28, "No space left on device", "/x"), "error: '/x' cannot be written (No sp", 1),
        (BrokenPipeError(32, "Broken pipe"), "error: nobody reads what is printed", 1),
        (MemoryError("Unable to allocate"), "error: the memory is too small (MemoryError: Un", 1),
        (tf.errors.ResourceExhaustedError(None, None, "OOM"), "error: the memory is too small", 1),
        (UnicodeEncodeError("ascii", "x", 0, 1, "no"), "error: a text is not in the encoding", 1),
        (KeyboardInterrupt(), "interrupted; what is finished is kept, run the same", 130),
        (KeyboardInterrupt("stopped at step 5"), "interrupted; stopped at step 5", 130),
        (
            FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "error: no usable temporary directory found in ['/tmp']; set TMPDIR to a folder", 1,
        ),
    ],
)  # fmt: skip
def test_what_surrounds_a_command_ends_as_a_sentence(capsys, error, text, code):
    with pytest.raises(SystemExit) as ended, edge.outer():
        raise error
    err = capsys.readouterr().err
    assert (ended.value.code, err.count("\n")) == (code, 1) and err.startswith(text)


def test_a_missing_package_is_for_the_doctor(capsys):
    with pytest.raises(SystemExit), edge.importing():
        raise ModuleNotFoundError("No module named 'safetensors'")
    assert "No module named 'safetensors'); lth-doctor says which" in capsys.readouterr().err


def test_a_fault_of_the_package_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), edge.outer():
        raise ZeroDivisionError


def test_what_a_terminal_cannot_show_is_a_question_mark(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    with edge.outer():
        print("mean \u00b1 deviation", flush=True)
    assert narrow.buffer.getvalue() == b"mean ? deviation\n"


def test_folders_are_read_as_people_write_them(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(edge.folder("~/runs")) == "/home/somebody/runs"
    assert str(edge.folder("a~/b")) == "a~/b"
    for wrong in ("gs://bucket/x", "s3://bucket", "file:/x"):
        with pytest.raises(UserError, match="is not a folder of this machine; give a local one"):
            edge.folder(wrong)
    with pytest.raises(UserError, match="'' is no folder"):
        edge.folder("")


# --- Circumstances, in processes of their own ---

STUBS = {
    "home": "import os, pwd\n"
    "os.environ.pop('HOME', 0)\n"
    "def nobody(*_): raise KeyError('uid not found')\n"
    "pwd.getpwuid = pwd.getpwnam = nobody\n",
    "temporary": "import os, tempfile\n"
    "tempfile._candidate_tempdir_list = lambda: [os.devnull]\n"
    "real = os.access\n"
    "os.access = lambda path, mode: path != '/dev/shm' and real(path, mode)\n",
    "container": "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/dev/null']\n",
}


def python(stub, module, *words, code="", cwd=None, **environ):
    """A process of a tool, or of `code`, where something is missing."""
    text = STUBS.get(stub, "") + (code or (
        f"import runpy, sys; sys.argv = ['lth-{module}', *{list(map(str, words))!r}]\n"
        f"runpy.run_module('lth_tf.tools.{module}', run_name='__main__')"
    ))  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", text], env={**os.environ, **environ},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
        # Of a test run in the background it would be ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_a_whole_run_without_home_on_an_ascii_terminal_in_quiet(tmp_path):
    """Nor with the log level that people set to have quiet."""
    process = python(
        "home", "imp", *TINY, f"--workdir={tmp_path}/run", cwd=tmp_path,
        PYTHONIOENCODING="ascii", TF_CPP_MIN_LOG_LEVEL="3", MPLCONFIGDIR=str(tmp_path),
    )  # fmt: skip
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "mean ? standard deviation" in out and (tmp_path / "run" / "figure.png").exists()
    assert not err.strip() and not (tmp_path / "~").exists()


def test_without_a_temporary_folder_it_is_imported_and_says_so(tmp_path):
    environ = {"MPLCONFIGDIR": str(tmp_path)}
    process = python("temporary", "imp", *TINY, f"--workdir={tmp_path}/run", **environ)
    out, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert err.startswith("error: no usable temporary directory") and "set TMPDIR" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_read_only_container_has_shared_memory_but_not_for_every_network(tmp_path):
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("here is none")
    words = [*TINY, "--model=lenet_2000000000_9", f"--workdir={tmp_path}/run"]
    process = python("container", "imp", *words, MPLCONFIGDIR=str(tmp_path))
    out, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert err.startswith("error: the memory is too small (ResourceExhaustedError: OOM when alloc")
    assert "take a smaller --model" in err


@pytest.mark.parametrize("seconds", [0.3, 1.5])
def test_an_early_interrupt_is_one_line(tmp_path, seconds):
    process = python("", "imp", *TINY, f"--workdir={tmp_path}/run")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and not (tmp_path / "run").exists()
    assert err == "interrupted; nothing was begun yet\n" and not out


@pytest.mark.parametrize("level, quiet", [(None, True), ("2", True), ("3", True), ("1", False)])
def test_only_0_and_1_turn_the_filter_off(capfd, monkeypatch, level, quiet):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    if level:
        monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", level)
    with compat._quiet():
        os.write(2, b"I0000 00:00 port.cc:153] oneDNN custom operations are on.\nour own line\n")
    assert os.environ.get("TF_CPP_MIN_LOG_LEVEL") == level
    assert ("oneDNN" not in capfd.readouterr().err) == quiet


# --- Ctrl-C ---


def test_ctrl_c_keeps_the_state_and_a_rerun_ends_alike(monkeypatch, tmp_path):
    """As SIGTERM does: one checkpoint, and the same bits in the end."""
    spec = Spec(
        dataset="digits", validation_size=100, model="lenet_20_10", train_steps=200, levels=0,
        eval_every=50, checkpoint_every=0, compile="off", distribute="none",
    )  # fmt: skip
    data, before = datasets.load("digits"), signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    original = laboratory.Trainer.advance

    def press(self, step, *rest):
        if step == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, *rest)

    monkeypatch.setattr(laboratory.Trainer, "advance", press)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped at step 150 of 200, whose state is k"):
            experiments.run(spec, tmp_path / "a", data)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(list((tmp_path / "a").rglob("checkpoint_*"))) == 1
    monkeypatch.setattr(laboratory.Trainer, "advance", original)
    for name in "ab":
        experiments.run(spec, tmp_path / name, data)
    one, other = (
        (tmp_path / name / "replicate_00/level_00/trained.safetensors").read_bytes()
        for name in "ab"
    )
    assert one == other


def test_ctrl_c_where_nothing_has_to_be_saved_is_the_usual_one():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), checkpoints.terminations() as asked:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert asked() and asked.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_it_at_once():
    """While something is computed that no handler of Python interrupts."""
    code = (
        "import hashlib\n"
        "from lth_tf.training import checkpoints\n"
        "with checkpoints.terminations() as asked, asked.patiently():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    process = python("", "", code=code)
    assert process.stdout.readline() == "ready\n"
    for _ in range(100):  # of two that come at once the system delivers one
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.3)
            break
    process.kill()
    assert process.wait() == 130
    said = process.stderr.read().splitlines()
    assert [line.split(";")[0].split(":")[0] for line in said] == ["interrupted", "ended at once"]

# --- Mistaken command lines ---

PLAN = [*TINY, "--plan"]
MISTAKES = [
    # imp: names.
    ("imp", ["--model=lenet_300_10O"], "unknown model"),
    ("imp", ["--model="], "unknown model ''"),
    ("imp", ["--model=lenet_0_10"], "unknown model"),
    ("imp", ["--model=lenet_-3"], "unknown model"),
    ("imp", ["--model=resnet20x"], "unknown model"),
    ("imp", ["--dataset=minst"], "Did you mean 'mnist'"),
    ("imp", ["--dataset="], "unknown data set ''"),
    ("imp", ["--scope=globl"], "Did you mean 'global'"),
    ("imp", ["--init=glorot"], "unknown"),
    ("imp", ["--optimizer=adamm"], "Did you mean 'adam'"),
    ("imp", ["--optimizer=ftrl"], "unknown optimizer"),
    ("imp", ["--lr_schedule=step"], "Did you mean 'steps'"),
    ("imp", ["--retrain=rewnd"], "Did you mean 'rewind'"),
    ("imp", ["--precision=float16"], "unknown precision"),
    ("imp", ["--compile=yes"], "unknown compile"),
    ("imp", ["--distribute=mirror"], "Did you mean 'mirrored'"),
    ("imp", ["--augmentation=flip"], "unknown augmentation"),
    ("imp", ["--normalization=None"], "unknown normalization"),
    ("imp", ["--controls=reinit,rand"], "unknown branch 'rand'"),
    ("imp", ["--controls=invert"], "the branch 'invert' ranks initial weights anew"),
    ("imp", ["--protect=conv*"], "fits no kernel"),
    ("imp", ["--preset=mnist"], "unknown preset 'mnist'"),
    ("imp", ["--preset="], "unknown preset ''"),
    ("imp", ["--flagfile=none.flags"], "there is no flag file"),
    ("imp", ["--flagfile={empty}"], "there is no flag file"),
    # imp: flags.
    ("imp", ["--modle=lenet_20_10"], "Unknown command line flag 'modle'"),
    ("imp", ["--density=0.1"], "Unknown command line flag 'density'"),
    ("imp", ["--levels"], "--levels"),
    ("imp", ["stray"], "unexpected 'stray'"),
    ("imp", ["--", "stray"], "unexpected 'stray'"),
    ("imp", ["--plan=maybe"], "plan"),
    ("imp", ["--one_shot=2"], "one_shot"),
    # imp: numbers.
    ("imp", ["--levels=-1"], "levels -1 is out of range"),
    ("imp", ["--levels=2.5"], "'2.5' is not a whole number"),
    ("imp", ["--levels=three"], "'three' is not a whole number"),
    ("imp", ["--levels=1e3"], "'1e3' is not a whole number"),
    ("imp", ["--levels=40"], "nothing would be left of"),
    ("imp", ["--levels=100000"], "levels 100000 is out of range"),
    ("imp", ["--train_steps=0"], "train_steps 0 is out of range"),
    ("imp", ["--batch_size=0"], "batch_size 0 is out of range"),
    ("imp", ["--learning_rate=-1"], "learning_rate -1.0 is out of range"),
    ("imp", ["--learning_rate=0"], "learning_rate 0.0 is out of range"),
    ("imp", ["--learning_rate=fast"], "'fast' is not a number"),
    ("imp", ["--learning_rate=nan"], "learning_rate must be a finite number"),
    ("imp", ["--learning_rate=inf"], "learning_rate must be a finite number"),
    ("imp", ["--learning_rate=1,2"], "'1,2' is not a number"),
    ("imp", ["--momentum=1"], "momentum 1.0 is out of range"),
    ("imp", ["--weight_decay=-0.1"], "weight_decay -0.1 is out of range"),
    ("imp", ["--eval_every=0"], "eval_every 0 is out of range"),
    ("imp", ["--seed=-1"], "seed -1 is out of range"),
    ("imp", ["--replicates=0"], "replicates 0 is out of range"),
    ("imp", ["--validation_size=0"], "validation_size 0 is out of range"),
    ("imp", ["--width=0"], "width 0.0 is out of range"),
    ("imp", ["--width=2"], "has no width to choose"),
    ("imp", ["--devices=0"], "devices 0 is out of range"),
    ("imp", ["--worker_timeout=0"], "worker_timeout 0.0 is out of range"),
    ("imp", ["--checkpoint_every=-5"], "checkpoint_every -5 is out of range"),
    ("imp", ["--target_density=0"], "target_density 0.0 is out of range"),
    ("imp", ["--target_density=1.5"], "target_density 1.5 is out of range"),
    ("imp", ["--target_density=20%"], "'20%' is not a number"),
    ("imp", ["--target_density=1e-9"], "nothing would be left of"),
    ("imp", ["--prune_fraction=1"], "prune_fraction 1.0 is out of range"),
    ("imp", ["--prune_fraction=20"], "prune_fraction 20.0 is out of range"),
    ("imp", ["--prune_fraction=0"], "nothing would ever be pruned"),
    # imp: what would be done, but not as it was meant.
    ("imp", ["--prune_fraction=1e-9"], "level 1 would remove none of the 1580 weights"),
    ("imp", ["--scope=global", "--prune_fraction=1e-5"], "level 1 would remove none"),
    ("imp", ["--prune_fraction_output=1e-4"], "removes no weight of output/kernel at any level"),
    ("imp", ["--target_density=0.99999"], "level 1 would remove none of the 1580 weights"),
    ("imp", ["--lr_schedule=steps"], "needs lr_drops"),
    ("imp", ["--lr_drops=5"], "have no meaning for lr_schedule 'constant'"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=1,x"], "'x' is not a whole number"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=-1"], "must not contain negative numbers"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=9999"], "lr_drops [9999] lie behind the end of"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=5,20"], "lr_drops [20] lie behind the end of"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=9,5"], "lr_drops [9, 5] must rise"),
    ("imp", ["--lr_schedule=steps", "--lr_drops=5,5"], "lr_drops [5, 5] must rise"),
    ("imp", ["--warmup_steps=21"], "warmup_steps 21 lie behind the end of training"),
    ("imp", ["--rewind_step=20"], "lies behind the end of training"),
    ("imp", ["--rewind_step=1.5"], "neither a whole step nor a fraction"),
    ("imp", ["--rewind_step=0.001"], "is less than one step"),
    ("imp", ["--retrain_steps=21"], "exceeds train_steps 20"),
    ("imp", ["--retrain=finetune", "--rewind_step=5"], "has no meaning for --retrain=finetune"),
    ("imp", ["--control_levels=1"], "control_levels are given but no controls"),
    ("imp", ["--controls=reinit", "--control_levels=9"], "control_levels [9] are out of range"),
    ("imp", ["--distribute=none", "--devices=2"], "devices has no meaning"),
    ("imp", ["--workers=2"], "workers needs --distribute=multi_worker"),
    # imp: where.
    ("imp", ["--workdir={file}", "--noplan"], "a file is in the way"),
    ("imp", ["--workdir={file}/below", "--noplan"], "a file is in the way"),
    ("imp", ["--workdir=gs://bucket/run"], "'gs://bucket/run' is not a folder of this machine"),
    ("imp", ["--workdir="], "'' is no folder"),
    ("imp", ["--trunk=s3://bucket"], "'s3://bucket' is not a folder of this machine"),
    ("imp", ["--data_dir=gs://b", "--dataset=mnist"], "gs://b"),
    # imp: too large.
    ("imp", ["--batch_size=5000", "--noplan"], "batch_size 5000 exceeds the 1337 training"),
    ("imp", ["--validation_size=2000", "--noplan"], "validation"),
    ("imp", [f"--model=lenet_{10**30}_9"], "units is too large"),
    ("imp", ["--model=resnet32", "--width=1e30"], "units is too large"),
    ("imp", [f"--train_steps={10**30}", "--noplan"], "train_steps 1000000000000"),
    ("imp", [f"--seed={10**30}", "--noplan"], "seed 1000000000000"),
    ("imp", [f"--batch_size={10**30}", "--noplan"], "batch_size 1000000000000"),
    ("imp", [f"--replicates={10**30}", "--noplan"], "replicates 1000000000000"),
    # one_shot.
    ("one_shot", ["--density=0"], "density 0.0 is out of range"),
    ("one_shot", ["--density=10%"], "'10%' is not a number"),
    ("one_shot", ["--density=0.1,0.1"], "must name different densities"),
    ("one_shot", ["--density=0.1,0.1001"], "both keep 158 of 1580 weights; give one of them"),
    ("one_shot", ["--density=0.9999"], "density 0.9999 removes none of the 1580 weights"),
    ("one_shot", ["--density=1e-6"], "leaves nothing"),
    ("one_shot", ["--density="], "must name different densities"),
    ("one_shot", ["--compression=0.5"], "compression '0.5' is out of range"),
    ("one_shot", ["--compression=ten"], "compression 'ten' is out of range"),
    ("one_shot", ["--scorer=grsp"], "Did you mean 'grasp'"),
    ("one_shot", ["--score_loss=mse"], "unknown loss"),
    ("one_shot", ["--rounds=0"], "rounds 0 is out of range"),
    ("one_shot", ["--temperature=0"], "temperature 0.0 is out of range"),
    ("one_shot", ["--scorer=snip", "--temperature=2"], "needs --scorer=grasp"),
    ("one_shot", ["--scorer=snip", "--grasp_variant=official"], "needs --scorer=grasp"),
    ("one_shot", ["--levels=3"], "Unknown command line flag 'levels'"),
    ("one_shot", ["--min_per_layer=-1"], "min_per_layer -1 is out of range"),
    ("one_shot", ["--min_per_layer=900", "--density=0.1"], "min_per_layer"),
    ("one_shot", ["--samples_per_class=0"], "samples_per_class 0 is out of range"),
    ("one_shot", ["--controls=absolute", "--scorer=snip"], "changes nothing for scorer snip"),
    ("one_shot", ["--score_only=perhaps"], "score_only"),
    # The others.
    ("branch", [], "--branch"),
    ("branch", ["--branch=", "--workdir={work}"], "--branch= names none; there are: reinit, "),
    ("branch", ["--branch=shufle", "--workdir={work}"], "Did you mean 'shuffle'"),
    ("branch", ["--branch=reinit", "--levels=1,two", "--workdir={work}"], "whole numbers only"),
    ("branch", ["--branch=reinit", "--levels=99", "--workdir={work}"], "control_levels [99] are"),
    ("branch", ["--branch=reinit", "--workdir={empty}"], "is not the workdir of an experiment"),
    ("branch", ["--branch=reinit", "--workdir=gs://b/x"], "is not a folder of this machine"),
    ("compare", ["--workdirs={work}"], "--output"),
    ("compare", ["--workdirs=", "--output={empty}/c"], "workdir"),
    ("compare", ["--workdirs={empty}", "--output={empty}/c"], "is not the workdir of an exper"),
    ("compare", ["--workdirs={work},{work}", "--output={empty}/c"], "error: "),
    ("compare", ["--workdirs={work}", "--output=gs://b"], "is not a folder of this machine"),
    ("export", ["--workdir={work}"], "--level"),
    ("export", ["--workdir={work}", "--level=99"], "does not exist in"),
    ("export", ["--workdir={work}", "--level=one"], "level"),
    ("export", ["--workdir={work}", "--level=0", "--branch="], "--branch= names none"),
    ("export", ["--workdir={work}", "--level=0", "--format=onnx"], "unknown export format"),
    ("export", ["--workdir={work}", "--level=0", "--what=all"], "what"),
    ("export", ["--workdir={empty}", "--level=0"], "is not a workdir"),
    ("export", ["--workdir={work}", "--level=0", "--replicate=7"], "does not exist in"),
    ("sweep", ["--presets=digits_lenet_imp"], "--workdir"),
    ("sweep", ["--workdir={empty}/s", "--seeds="], "must name different values"),
    ("sweep", ["--workdir={empty}/s", "--seeds=1,1"], "must name different values"),
    ("sweep", ["--workdir={empty}/s", "--seeds=one"], "'one' is not a whole number"),
    ("sweep", ["--workdir={empty}/s", "--presets=none"], "unknown preset 'none'"),
    ("sweep", ["--workdir={empty}/s", "--jobs=0"], "jobs"),
    ("sweep", ["--workdir={empty}/s", "--shard=3/2"], "shard"),
    ("sweep", ["--workdir={empty}/s", "--shard=x"], "shard"),
    ("sweep", ["--workdir={file}", "--seeds=1"], "choose another name for --workdir"),
    ("sweep", ["--workdir=gs://b/s", "--seeds=1"], "is not a folder of this machine"),
    ("sweep", ["--workdir={empty}/s", "--scorers=snp"], "Did you mean 'snip'"),
    ("sweep", ["--workdir={empty}/s", "--", "--lr_schedule=steps", "--lr_drops=99999"],
     "lie behind the end of training"),
    ("sweep", ["--workdir={empty}/s", "--", "--levels=2", "--density=0.1"], "flags of several rec"),
    ("bench", [], "no command given; there are: "),
    ("bench", ["trian"], "unknown command 'trian'"),
    ("bench", ["train", "--rounds=0"], "rounds"),
    ("bench", ["train", "more"], "unexpected 'more'"),
    ("doctor", ["stray"], "unexpected 'stray'"),
    ("doctor", ["--dataset=minst"], "Did you mean 'mnist'"),
    ("doctor", ["--workdir=gs://b"], "is not a folder of this machine"),
    ("launch_local", ["--grace=nan", "--", "true"], "--grace=nan is no number of seconds"),
    ("launch_local", ["--grace=-1", "--", "true"], "grace"),
    ("launch_local", ["--workers=0", "--", "true"], "workers"),
    ("launch_local", ["--workers=2"], "there is no command"),
    ("launch_local", ["lth-imp"], "write -- before the command"),
    ("launch_local", ["--", "lth-impp"], "Did you mean 'lth-imp'"),
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A workdir, begun."""
    folder = tmp_path_factory.mktemp("work") / "run"
    shutil.copytree(pathlib.Path(__file__).parent / "formats" / "1" / "interrupted", folder)
    return folder


@pytest.mark.parametrize(
    "name, words, message", MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else None
)
def test_a_mistake_is_told_without_a_traceback(
    monkeypatch, capfd, tmp_path, work, name, words, message
):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"file": tmp_path / "file", "empty": tmp_path / "empty", "work": work}
    given = [word.format(**places) for word in words]
    own = {
        "imp": [f"--workdir={tmp_path}/run", *PLAN],
        "one_shot": [f"--workdir={tmp_path}/run", *NETWORK, "--plan"],
    }
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*")}
    code, out, err = run(monkeypatch, capfd, *own.get(name, ()), *given, name=name)
    said = f"{out}{err}{code}"  # what is given to sys.exit is printed by Python later
    assert code and "Traceback" not in said
    assert message in said
    assert not (tmp_path / "run" / "spec.json").exists()
    assert not list((tmp_path / "empty").iterdir())
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*")} == before


def test_there_are_enough_of_them():
    assert len({(name, *words) for name, words, _ in MISTAKES}) >= 120


# --- The Python interface ---


def _network():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(6, activation="relu", name="a"),
            keras.layers.Dense(3, name="b"),
        ]
    )


X, Y = np.ones((10, 8), np.float32), np.arange(10) % 3
SCORES = {"k": np.arange(6.0).reshape(2, 3), "l": np.arange(12.0).reshape(3, 4)}
ONES = {"a/kernel": np.ones((8, 6)), "b/kernel": np.ones((6, 3))}


def test_a_ticket_is_taken_for_its_mask():
    model = pruning.prune(_network())
    mask = {"a/kernel": np.eye(8, 6, dtype=np.uint8), "b/kernel": np.ones((6, 3), np.uint8)}
    pruning.set_mask(model, tickets.Ticket(mask, {}, 1, 0, {}, Spec()))
    assert all((pruning.get_mask(model)[name] == m).all() for name, m in mask.items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: pruning.set_mask(m, None), "a mask is a dict of kernel name -> array, not None"),
        (lambda m: pruning.set_mask(m, X), "a mask is a dict of .*, not ndarray"),
        (lambda m: pruning.set_mask(m, {n: [[1], [1, 0]] for n in ONES}), "'a/kernel' is no array"),
        (lambda m: pruning.set_mask(m, ONES, "adam"), "str is no optimizer of tf_keras"),
        (lambda m: pruning.set_mask(m, ONES, keras.optimizers.Adam), "Adam is no optimizer"),
        (lambda m: pruning.check(m, 5), "int is no optimizer of tf_keras"),
        (lambda m: pruning.set_mask(None, ONES), "takes a tf_keras model, not NoneType"),
        (lambda m: pruning.get_mask(None), "takes a tf_keras model, not NoneType"),
        (lambda m: pruning.strip(None), "takes a tf_keras model, not NoneType"),
        (lambda m: score(m, "snip", X), "a batch is .inputs, labels., not ndarray"),
        (lambda m: score(m, "snip", (X, Y)), r"for a single one give \[\(inputs, labels\)\]"),
        (lambda m: score(m, "snip", 5), "batches must be an iterable of .*, not int"),
        (lambda m: score(m, "snip", [(None, Y)]), "a batch has None"),
        (lambda m: score(m, "snip", [(np.array([[1], [1, 2]], object), Y)]), "Python objects"),
        (lambda m: score(m, "snip", [(tf.ragged.constant([[1.0], []]), [0, 1])]), "to_tensor"),
        (lambda m: score(m, "snip", [(tf.sparse.from_dense(X), Y)]), "tf.sparse.to_dense"),
        (lambda m: score(m, None, [(X, Y)]), "unknown scorer None; there are: fisher_diag, "),
        (lambda m: score(m, "grasp", [(X, Y)], temperature="hot"), "must be a number, not 'hot'"),
        (
            lambda m: one_shot_mask(_network(), "magnitude", density=0.5, transform=np.transpose),
            "transform made shape",
        ),
        (lambda m: one_shot_mask(_network(), "magnitude", density=None), "density must be a numb"),
        (lambda m: experiments.imp(None, "x", None), "spec must be a lth_tf.Spec, not NoneType"),
        (lambda m: experiments.run(Spec(), "x", None), "dataset must be what .*, not NoneType"),
        (lambda m: datasets.load(None), "unknown data set None"),
    ],
)
def test_what_is_no_such_thing_is_told(call, message):
    with pytest.raises(UserError, match=message):
        call(pruning.prune(_network()))


PARAMETERS = {"model", "spec", "path", "workdir", "ticket", "rows", "log_dir", "name"}
WITHIN = {  # what only this package calls, with what it has made itself
    "write_summary", "write_spec", "require_own", "sizes", "weighed", "read", "branch", "told",
    "finished", "require_metrics", "save_trained",
}  # fmt: skip


def public():
    """What people call: a name, the function, its parameters without a default."""
    for room in (lth_tf, pruning, tickets, training, models, callbacks, exporters, analysis,
                 experiments, datasets):  # fmt: skip
        for name in getattr(room, "__all__", ["load"]):
            value = getattr(room, name)
            kinds = inspect.isfunction(value) or inspect.isclass(value)
            if not kinds or name in WITHIN or issubclass(type(value), type) and issubclass(
                value, (BaseException, tuple)
            ):
                continue
            needed = [
                p.name for p in inspect.signature(value).parameters.values()
                if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
            ]  # fmt: skip
            if needed and needed[0] in PARAMETERS:
                yield pytest.param(value, len(needed), id=f"{room.__name__}.{name}")


@pytest.mark.parametrize("call, count", list(public()))
def test_no_public_function_fails_in_its_own_words(call, count):
    """Where something else than what it takes is given for all that it needs."""
    for junk in (None, 3, [1], object(), np.zeros(3), {"a": 1}, "nowhere"):
        try:
            call(*[junk] * count)
        except UserError:
            pass
        except TypeError as error:
            assert "missing" in str(error) and "keyword-only" in str(error)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    "given, message",
    [
        ({"within": {n: s.T for n, s in SCORES.items()}}, r"within has shape \(3, 2\) for 'k'"),
        ({"within": {"k": SCORES["k"]}}, r"within has the kernels \['k'\], the scores have"),
        ({"within": {**SCORES, "z": X}}, "within has the kernels"),
        ({"within": X}, "within must be a dict of kernel name -> array, not ndarray"),
        ({"within": tickets.Ticket({}, {}, 1, 0, {}, Spec())}, "of a ticket give its .mask"),
        ({"within": {n: np.full(s.shape, "x") for n, s in SCORES.items()}}, "array of numbers"),
        ({"scores": None}, "scores must be a dict of kernel name -> array, not NoneType"),
        ({"scores": {"k": None}}, "scores of 'k' must be an array of numbers"),
        ({"density": "a"}, "density must be a number or a dict"),
        ({"density": None}, "density must be a number or a dict"),
        ({"density": {"k": "a", "l": 0.5}}, "the density of 'k' must be a number"),
        ({"min_per_layer": 1.5}, "min_per_layer must be a whole number or None, not 1.5"),
    ],
)
def test_scopes_take_what_fits_and_broadcast_nothing(scope, given, message):
    with pytest.raises(UserError, match=message):
        SCOPES[scope](**{"scores": SCORES, "density": 0.5, **given})
