"""The memory of processes, in MB, as the system tells it."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

INTERVAL = 0.1  # seconds between two looks at the memory
_STATM = "/proc/self/statm"


def megabytes(usage: resource.struct_rusage) -> float:
    """Returns the peak memory of what a usage is of."""
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def own_peak() -> float:
    """Returns the peak memory of this process."""
    try:  # what a parent sees of its child on Linux includes its own peak
        with open("/proc/self/status") as file:
            return next(int(x.split()[1]) for x in file if x.startswith("VmHWM")) / 2**10
    except OSError:
        return megabytes(resource.getrusage(resource.RUSAGE_SELF))


def peak_of(call: str, *arguments: str) -> float:
    """Returns the peak memory of a Python process of its own, which prints it last.

    Args:
      call: 'lth_tf.module:function', called with the arguments; it prints `own_peak()`.
      arguments: handed on.
    """
    module, name = call.split(":")
    child = f"import sys; from {module} import {name}; {name}(*sys.argv[1:])"
    command = [sys.executable, "-c", child, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


@contextlib.contextmanager
def sampled() -> Iterator[list[tuple[float, float]]]:
    """Within, a list grows by (time in seconds, resident MB) every INTERVAL; on Linux."""
    samples: list[tuple[float, float]] = []
    ended = threading.Event()

    def look() -> None:
        while os.path.exists(_STATM):
            with open(_STATM) as file:
                pages = int(file.read().split()[1])
            samples.append((time.perf_counter(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
            if ended.wait(INTERVAL):
                break

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield samples
    finally:
        ended.set()
        looking.join()
