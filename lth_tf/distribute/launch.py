"""Several workers on this machine, as processes: to try out what runs on many."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

from lth_tf.errors import UserError
from lth_tf.execution import cores
from lth_tf.registry import nearest

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns the words before the first "--", and the command after it.

    Raises:
      UserError: there are words of a command, but no "--".
    """
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    stray = [word for word in words[1:at] if not word.startswith("-")]
    if stray and at == len(words):
        raise UserError(f"unexpected {stray[0]!r}: write -- before the command")
    return words[:at], words[at + 1 :]


def local(command: Sequence[str], workers: int, grace: float = 60.0) -> int:
    """Runs a command as every worker of a cluster on this machine, until all have ended.

    Each gets its TF_CONFIG and its share of the cores; its lines come out as they are written,
    with "[index] " before them. SIGINT, SIGTERM and SIGHUP go to all workers.

    Args:
      command: words; the first is a program, or a console command of this package.
      workers: how many.
      grace: seconds that the others have to end by themselves when one has failed; then they
        are killed.

    Returns:
      0 if all ended with 0, else the exit code of the worker that failed first, 128 + the
      signal's number if one ended it.

    Raises:
      UserError: no command, or none of that name.
    """
    words = _resolved(command)
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes: list[subprocess.Popen] = []
    readers: list[threading.Thread] = []
    try:
        with _caught() as signals:
            for index in range(workers):
                processes.append(_start(words, addresses, index))
                readers += _readers(processes[-1], index)
            code = _wait(processes, grace, signals)
    finally:
        _kill(processes)
    for reader in readers:
        reader.join(5)  # what a worker has left running may hold its pipe open for ever
    return code


def _resolved(command: Sequence[str]) -> list[str]:
    """The words that start a command; a console command of this package needs no PATH."""
    if not command:
        raise UserError(
            "there is no command; write it after --, as in: python -m lth_tf.tools.launch_local "
            "--workers=2 -- lth-imp --preset=digits_lenet_imp --distribute=multi_worker"
        )
    name, *rest = command
    if shutil.which(name):
        return [name, *rest]
    scripts = {
        script.name: script.value.partition(":")[0]
        for script in importlib.metadata.entry_points(group="console_scripts")
        if script.value.startswith("lth_tf.")
    }
    if name not in scripts:
        raise UserError(
            f"there is no program {name!r} on the PATH, and lth_tf has {', '.join(scripts)}."
            f"{nearest(name, list(scripts))}"
        )
    return [sys.executable, "-m", scripts[name], *rest]


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody uses.

    They are below those that the system gives to outgoing connections, one of which could
    otherwise take a port before its worker does.
    """
    found: list[int] = []
    for port in random.sample(range(20000, 32768), 12768):
        if len(found) == count:
            return found
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            found.append(port)
    raise UserError(f"this machine has no {count} free ports between 20000 and 32767")


def _start(words: list[str], addresses: list[str], index: int) -> subprocess.Popen:
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    environ = {
        "TF_NUM_INTRAOP_THREADS": str(max(1, cores() // len(addresses))), **os.environ,
        "TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    try:
        return subprocess.Popen(
            words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            # A process group of its own: Ctrl-C reaches it once, through this process.
            stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot run {words[0]!r}: {error.strerror}") from error


def _readers(process: subprocess.Popen, index: int) -> list[threading.Thread]:
    """Threads, started, that pass on what a worker writes."""
    pipes = ((process.stdout, sys.stdout), (process.stderr, sys.stderr))
    readers = [
        threading.Thread(target=_pass_on, args=(*pipe, index), daemon=True) for pipe in pipes
    ]
    for reader in readers:
        reader.start()
    return readers


def _pass_on(source: IO[bytes], target: IO[str], index: int) -> None:
    for line in source:
        text = line.decode(errors="replace").removesuffix("\n")
        # Nobody may be reading any more; the worker's pipe must be emptied all the same.
        with contextlib.suppress(OSError):
            target.write(f"[{index}] {text}\n")
            target.flush()


@contextlib.contextmanager
def _caught() -> Iterator[list[int]]:
    """Within, signals to this process are only noted, in the list that it yields."""
    signals: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in FORWARDED
    }
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen], grace: float, signals: list[int]) -> int:
    """Returns the first exit code that is not 0, once all have ended or were killed.

    Args:
      processes: the workers.
      grace: see `local`.
      signals: numbers of signals to pass on; more come while this runs.
    """
    first, deadline = 0, float("inf")
    while True:
        while signals:
            number = signals.pop(0)
            for process in processes:
                process.send_signal(number)
        codes = [process.poll() for process in processes]
        failed = [(index, code) for index, code in enumerate(codes) if code]
        if failed and not first:
            index, code = failed[0]
            first, deadline = code if code > 0 else 128 - code, time.monotonic() + grace
            if None in codes:
                _say(f"worker {index} ended with {first}; the others have {grace:g} s to end")
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            left = ", ".join(str(index) for index, code in enumerate(codes) if code is None)
            _say(f"{grace:g} s are over: killing worker {left}")
            _kill(processes)
        time.sleep(0.05)


def _say(text: str) -> None:
    print(f"launch_local: {text}", file=sys.stderr, flush=True)


def _kill(processes: list[subprocess.Popen]) -> None:
    """Ends, with all that they have started, those that have not ended."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
