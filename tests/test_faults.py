"""Real processes of lth-imp that are killed, damaged and starved end as one that was left alone.

LTH_TF_FAULTS=35 python -m pytest -s tests/test_faults.py has more of them, in a longer run.
"""

import os
import random
import resource
import signal
import subprocess
import time

import pytest
from test_experiment import FLAGS as ALIKE
from test_experiment import command, contents

from lth_tf import datasets, flags
from lth_tf.experiments import imp

FAULTS = int(os.environ.get("LTH_TF_FAULTS", "1"))
KINDS = ["kill", "kill", "kill and damage", "kill", "full", "terminate", "terminate and damage"]
KINDS = KINDS[-FAULTS:]
STEPS = 220 * (FAULTS + 2)
FLAGS = (
    f"--train_steps={STEPS}", "--eval_every=200", "--levels=2", "--rewind_step=450",
    "--checkpoint_every=50", "--control_levels=1",
)  # fmt: skip


def files(workdir):
    """Finished files -> (inode, time)."""
    found = {}
    for path in workdir.rglob("*.safetensors"):
        try:
            stat = path.stat()
        except FileNotFoundError:  # a checkpoint that was followed by another
            continue
        found[path] = stat.st_ino, stat.st_mtime_ns
    return found


def small_files_only():
    """Makes the disk full for any file that is as large as a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, 25_000))


def strike(process, workdir, kind, moment):
    """Lets a process write something, waits for `moment` seconds and ends it; returns its code."""
    before = files(workdir)
    while files(workdir) == before and process.poll() is None:
        time.sleep(0.005)
    if kind == "full":
        return process.wait(60)
    time.sleep(moment)
    process.send_signal(signal.SIGTERM if "terminate" in kind else signal.SIGKILL)
    return process.wait(60)


@pytest.mark.slow
def test_a_run_that_is_killed_damaged_and_starved_ends_as_if_nothing_had_happened(tmp_path):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    spec = flags.parse([*ALIKE, *FLAGS], "imp")
    imp(spec, tmp_path / "calm", datasets.load(spec.dataset))
    random.seed(FAULTS)
    workdir, finished, struck = tmp_path / "struck", {}, []
    while len(struck) < FAULTS:
        kind = KINDS[len(struck) % len(KINDS)]
        limit = small_files_only if kind == "full" else None
        process = subprocess.Popen(command(workdir, *FLAGS), **quiet, preexec_fn=limit)
        code = strike(process, workdir, kind, random.uniform(0, 1.2 if FAULTS > 3 else 0.2))
        said = process.stderr.read()
        assert code == {"terminate": 143, "full": 1}.get(kind.split()[0], -signal.SIGKILL), said
        if "terminate" in kind:
            assert "stopped at step" in said and said.count("error: ") == 1, said
        if kind == "full":
            assert "the disk is full" in said and "what is finished is kept" in said, said
        struck.append((kind, code))
        print(len(struck), kind, said.strip()[-150:])
        now = files(workdir)
        assert all(now[path] == stat for path, stat in finished.items()), "done again"
        finished = {p: stat for p, stat in now.items() if "checkpoint_" not in p.name}
        if "damage" in kind:
            for newest in sorted(p for p in now if "checkpoint_" in p.name)[-1:]:
                whole = bytearray(newest.read_bytes())
                whole[len(whole) // 2] ^= 1
                newest.write_bytes(whole)
    done = subprocess.run(command(workdir, *FLAGS), check=True, capture_output=True, text=True)
    if "damage" in KINDS[(FAULTS - 1) % len(KINDS)]:
        assert "a checkpoint is damaged, going on from the one before" in done.stdout
    now = files(workdir)
    assert all(now[path] == stat for path, stat in finished.items()), "done again"
    calm, struck = contents(tmp_path / "calm"), contents(workdir)
    assert calm.keys() == struck.keys() and len(calm) == 15
    assert not [name for name in calm if calm[name] != struck[name]]
