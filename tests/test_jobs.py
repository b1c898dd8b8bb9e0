"""Trainings side by side: the files of one process, one display, one Ctrl-C, no orphans."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lth_tf import experiments
from lth_tf.analysis import summary
from lth_tf.errors import UserError
from lth_tf.experiments import crew
from lth_tf.spec import Spec

SMALL = [
    "--dataset=digits", "--model=lenet_30_10", "--train_steps=3000", "--eval_every=200",
    "--checkpoint_every=200", "--batch_size=60", "--optimizer=adam", "--learning_rate=1e-3",
    "--replicates=2", "--controls=reinit,shuffle", "--control_levels=1", "--threads=1",
    "--validation_size=200",
]  # fmt: skip
IMP = ["imp", *SMALL, "--levels=2", "--rewind_step=130"]


def begin(words, workdir, limit=None):
    shell = f"ulimit -f {limit}; " if limit else ""
    line = [sys.executable, "-m", f"lth_tf.tools.{words[0]}", *words[1:], f"--workdir={workdir}"]
    return subprocess.Popen(
        ["bash", "-c", f'{shell}exec "$@"', "-", *line],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A suite that a shell runs in the background ignores it, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def end(process):
    out, err = process.communicate(timeout=300)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def hands(process):
    """The processes that it has forked."""
    path = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()] if path.exists() else []


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def when(process, workdir, pattern, count):
    """Waits until so many files are there."""
    until = time.monotonic() + 120
    while len(list(workdir.glob(pattern))) < count:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.02)


def files(workdir):
    """Path -> content of what does not tell the time; all rows of tables but seconds."""
    found = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "metrics.csv":
            rows, _ = summary.read_metrics(path)
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        elif path.suffix in (".safetensors", ".json") and path.name != "summary.json":
            found[name] = path.read_bytes() if path.name != "trained.safetensors" else True
    rows = summary.read_summary(workdir)
    found["summary"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "w"
    code, _, err = end(begin(IMP, workdir))
    assert code == 0, err
    return files(workdir)


@pytest.mark.slow
@pytest.mark.skipif(crew.cores() < 2, reason="one core only")
def test_side_by_side_is_as_alone_whatever_was_killed_in_between(alone, tmp_path):
    work = tmp_path / "w"
    words = [*IMP, "--jobs=2"]

    one = begin(words, work)  # a hand is killed
    when(one, work, "replicate_*/level_*/checkpoint_*", 2)
    forked = hands(one)
    assert len(forked) == 2
    os.kill(forked[0], signal.SIGKILL)
    code, _, err = end(one)
    assert code == 1 and "a process of --jobs ended with SIGKILL while it was at replicate" in err
    assert "what is finished is kept" in err and not any(map(alive, forked))

    two = begin(words, work)  # Ctrl-C
    when(two, work, "replicate_*/level_00/trained.safetensors", 1)
    forked = hands(two)
    two.send_signal(signal.SIGINT)
    code, _, err = end(two)
    assert code == 130 and "the states of all trainings are kept" in err
    assert not any(map(alive, forked))

    three = begin(words, work)  # the leader is killed
    when(three, work, "replicate_*/level_01/ticket.safetensors", 1)
    forked = hands(three)
    three.kill()
    end(three)
    until = time.monotonic() + 20
    while any(map(alive, forked)):
        assert time.monotonic() < until
        time.sleep(0.05)

    code, out, err = end(begin(words, work))
    assert code == 0, err
    assert "2 trainings side by side, 1 thread(s) each" in out
    assert files(work) == alone
    assert not list(work.rglob("checkpoint_*"))

    code, _, err = end(begin([*words[:-1], "--threads=2"], work))
    assert code == 1 and "was begun with --threads=1; give that, or leave it out" in err


@pytest.mark.slow
@pytest.mark.skipif(crew.cores() < 2, reason="one core only")
def test_one_shot_deals_out_its_levels_and_a_failure_ends_all(tmp_path):
    words = ["one_shot", *SMALL, "--scorer=snip", "--density=0.5,0.2", "--dense", "--jobs=auto"]
    code, out, err = end(begin(words, tmp_path / "w"))
    assert code == 0 and "2 trainings side by side" in out, err
    rows = summary.read_summary(tmp_path / "w")
    assert len(rows) == 2 * (1 + 2 + 2) and out.count("early stop at") == len(rows)

    full = tmp_path / "full"  # of 12 KiB tickets fit in, checkpoints do not
    code, _, err = end(begin(words, full, limit=12))
    assert code == 1 and "the disk is full; free some" in err and "kept" in err

    wild = [w for w in words if "learning_rate" not in w and "optimizer" not in w]
    wild += ["--optimizer=sgd", "--learning_rate=1e30"]
    code, _, err = end(begin(wild, tmp_path / "wild"))
    assert code == 1 and "is not finite at step" in err and err.count("error:") == 1


@pytest.mark.parametrize("jobs", ["0", "-1", "two", "1.5", "", "²"])
def test_no_number_of_jobs(jobs):
    with pytest.raises(UserError, match="is neither a number from 1 on nor 'auto'"):
        experiments.jobs_of(jobs, Spec())


def test_more_jobs_than_cores_or_gpus_are_refused_and_auto_is_bounded(monkeypatch):
    monkeypatch.setattr(crew, "cores", lambda: 8)
    monkeypatch.setattr(crew, "_gpus", list)
    monkeypatch.setattr(crew, "_MEMORY", 1)
    with pytest.raises(UserError, match=r"--jobs=9 is more than the 8 core\(s\) here; give 8"):
        experiments.jobs_of("9", Spec())
    assert experiments.jobs_of("8", Spec()) == 8
    assert experiments.jobs_of("auto", Spec(replicates=3)) == 3
    assert experiments.jobs_of("auto", Spec(replicates=3, controls=("reinit",))) == 6
    monkeypatch.setattr(crew, "_MEMORY", 2**70)
    assert experiments.jobs_of("auto", Spec(replicates=3)) == 1
    monkeypatch.setattr(crew, "_gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match=r"--jobs=3 is more than the 2 GPU\(s\) here"):
        experiments.jobs_of("3", Spec())


def test_hands_get_their_share_of_the_gpus_and_the_leader_takes_no_memory(monkeypatch):
    monkeypatch.setattr(crew, "_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(crew, "_hand", lambda connection, _, alive, share: connection.send(share))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("TF_FORCE_GPU_ALLOW_GROWTH", "false")
    with crew.Crew(2, None) as made:
        shares = [hand.connection.recv() for hand in made._hands]
    assert shares == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"
