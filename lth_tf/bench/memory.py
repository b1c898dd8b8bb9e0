"""The memory of processes, in MB, as the system tells it."""

from __future__ import annotations

import contextlib
import os
import resource
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
