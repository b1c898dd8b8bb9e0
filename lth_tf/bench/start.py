"""How long a whole experiment takes until it trains."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from rich.table import Table

from lth_tf.bench.memory import megabytes
from lth_tf.bench.rounds import alone
from lth_tf.spec import Spec


def start(spec: Spec, data_dir: str | None, rounds: int) -> dict[str, Any]:
    """Measures a whole lth-imp that trains 100 steps, in child processes.

    Its seconds bound from above those from the start to the first training step.

    Args:
      spec: model, data set, batch size.
      data_dir: folder of the data sets.
      rounds: how often.

    Returns:
      seconds (median, data already cached) and peak_memory_mb (largest).
    """
    alone(spec)
    command = [
        sys.executable, "-m", "lth_tf.tools.imp", "--levels=0", "--train_steps=100",
        "--distribute=none",
        f"--model={spec.model}", f"--dataset={spec.dataset}", f"--batch_size={spec.batch_size}",
        f"--validation_size={spec.validation_size}",
        *([f"--data_dir={data_dir}"] if data_dir else []),
    ]  # fmt: skip
    seconds, peaks = [], []
    for i in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            taken, peak = _child([*command, f"--workdir={folder}"])
        if i:  # the first fills the caches
            seconds.append(taken)
            peaks.append(peak)
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "seconds": statistics.median(seconds),
        "peak_memory_mb": max(peaks),
    }


def _child(command: list[str]) -> tuple[float, float]:
    """Runs a process to its end; returns its seconds and its peak memory in MB."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} failed")
    taken = time.perf_counter() - began
    return taken, megabytes(usage)


def start_table(result: dict[str, Any]) -> Table:
    """Returns what `start` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}")
    for name in ("seconds", "peak_memory_mb"):
        table.add_column(name, justify="right")
    table.add_row(f"{result['seconds']:.1f}", f"{result['peak_memory_mb']:,.0f}")
    return table
