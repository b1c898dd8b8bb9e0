"""Workers as processes of this machine; the launcher is one, too."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from lth_tf.distribute import launch
from lth_tf.errors import UserError

WHO = "import json, os; i = json.loads(os.environ['TF_CONFIG'])['task']['index']; "


def launcher(*words, **environ):
    """A launcher's process."""
    return subprocess.Popen(
        [sys.executable, "-m", "lth_tf.tools.launch_local", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environ},
        bufsize=0,  # else communicate() would miss what readline() has read ahead
    )  # fmt: skip


def ended(process, within=20):
    """Exit code, stdout and stderr of a launcher."""
    out, err = process.communicate(timeout=within)
    return process.returncode, (out or b"").decode(), err.decode()


def python(code, *flags, **environ):
    return launcher(*flags, "--", sys.executable, "-c", WHO + code, **environ)


def test_each_worker_has_its_place_its_share_of_the_cores_and_its_prefix():
    code = "import sys; print(os.environ['TF_CONFIG'], os.environ['TF_NUM_INTRAOP_THREADS']); "
    code += "print(i, file=sys.stderr); print('no newline', end='')"
    code, out, err = ended(python(code, "--workers=3"))
    assert code == 0 and sorted(err.splitlines()) == ["[0] 0", "[1] 1", "[2] 2"]
    seen = []
    for index in range(3):
        first, last = (line[4:] for line in out.splitlines() if line.startswith(f"[{index}] "))
        config, _, threads = first.rpartition(" ")
        config = json.loads(config)
        seen.append(config["cluster"]["worker"])
        assert config["task"] == {"type": "worker", "index": index} and last == "no newline"
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 3)
    assert seen[0] == seen[1] == seen[2] and len(set(seen[0])) == 3
    assert all(address.startswith("127.0.0.1:") for address in seen[0])
    process = python("print(os.environ['TF_NUM_INTRAOP_THREADS'])", TF_NUM_INTRAOP_THREADS="7")
    assert sorted(ended(process)[1].splitlines()) == ["[0] 7", "[1] 7"]


def test_lines_come_as_they_are_written():
    process = python("import time; print('now'); time.sleep(60 * i)")
    began = time.monotonic()
    assert {process.stdout.readline(), process.stdout.readline()} == {b"[0] now\n", b"[1] now\n"}
    assert time.monotonic() - began < 20
    process.terminate()
    assert ended(process)[0] == 128 + signal.SIGTERM


def test_the_first_failure_decides_and_the_others_get_time_to_end():
    code = "import time; time.sleep(0 if i else 1); print('last words'); raise SystemExit(3 + i)"
    code, out, err = ended(python(code, "--grace=15"))
    assert code == 4 and "[0] last words" in out
    assert "worker 1 ended with 4; the others have 15 s to end" in err and "killing" not in err


def test_who_does_not_end_is_killed_with_all_it_has_started():
    code = "import signal, subprocess, sys, time; "
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN); i and sys.exit(5); "
    code += "print(subprocess.Popen(['sleep', '100']).pid, flush=True); time.sleep(100)"
    began = time.monotonic()
    code, out, err = ended(python(code, "--grace=1"))
    assert code == 5 and 1 < time.monotonic() - began < 10 and "killing worker 0" in err
    child = int(out.split()[1])
    for _ in range(50):
        try:
            with open(f"/proc/{child}/stat") as file:
                if file.read().split()[2] == "Z":
                    break
        except FileNotFoundError:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the worker's child lives on")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_go_to_all_workers_and_the_launcher_waits(number):
    code = "import signal, time; "
    code += f"signal.signal({int(number)}, lambda n, _: (time.sleep(i), print('saved'), exit(0))); "
    code += "print('ready'); time.sleep(60)"
    process = python(code)
    ready = sorted(process.stdout.readline() for _ in range(2))
    assert ready == [b"[0] ready\n", b"[1] ready\n"]
    process.send_signal(number)
    code, out, _ = ended(process)
    assert code == 0 and sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_a_reader_that_has_gone_does_not_block_the_workers():
    process = python("print('x' * 100 + '\\n' * 3000)")
    process.stdout.readline()
    process.stdout.close()
    process.stdout = None
    began = time.monotonic()
    ended(process)
    assert time.monotonic() - began < 15


def test_a_console_command_of_this_package_needs_no_path():
    code, out, _ = ended(launcher("--", "lth-doctor", "--helpshort", PATH="/usr/bin:/bin"))
    assert "[0] lth-doctor: what this machine has" in out and "--workdir" in out
    assert code == 1  # absl's, for help


@pytest.mark.parametrize(
    "words, said",
    [
        (["--workers=2", "lth-imp", "--preset=x"], "error: unexpected 'lth-imp': write -- before"),
        (["--workers=2"], "error: there is no command; write it after --"),
        (["--workers=2", "--"], "error: there is no command; write it after --"),
        (["imp", "--", "ls"], "error: unexpected 'imp' before --"),
        (["--", "lth-ump"], "error: there is no program 'lth-ump'.*Did you mean 'lth-imp'"),
        (["--workers=0", "--", "ls"], "--workers=0.*positive"),
        (["--worker=2", "--", "ls"], "Did you mean: workers"),
    ],
)
def test_what_is_wrong_is_said(words, said):
    code, out, err = ended(launcher(*words))
    assert code == 1 and not out and "Traceback" not in err
    assert re.search(said, err), err


def test_a_command_that_cannot_run_is_a_user_error(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\0\0")
    program.chmod(0o755)
    with pytest.raises(UserError, match="cannot run.*Exec format error"):
        launch.local([str(program)], 2)


def test_free_ports_are_free_and_no_outgoing_connection_gets_them():
    found = launch.free_ports(5)
    assert len(set(found)) == 5
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        lowest = int(file.read().split()[0])
    for port in found:
        assert port < lowest
        socket.create_server(("127.0.0.1", port)).close()


def test_the_launcher_needs_no_tensorflow():
    code = "import sys, lth_tf.tools.launch_local; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "lth_tf.distribute.launch" in done.stdout.split()
    assert not {"tensorflow", "numpy"} & set(done.stdout.split())
