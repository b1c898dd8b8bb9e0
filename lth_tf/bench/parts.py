"""Where the time of a whole experiment goes."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from rich.table import Table

from lth_tf import experiments
from lth_tf.bench.rounds import alone, alternate
from lth_tf.datasets import Dataset
from lth_tf.spec import Spec
from lth_tf.training import Trainer
from lth_tf.training.graph import Graph

PARTS = "import", "network", "compile", "train", "evaluate", "write", "rest"


class Clock:
    """Seconds by part, each moment counted for the innermost one that is open."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._open, self._since = ["rest"], time.perf_counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within, time is counted for a part."""
        self.turn()
        self._open.append(name)
        try:
            yield
        finally:
            self.turn()
            self._open.pop()

    def turn(self) -> None:
        """Counts the time since the last turn for the part that is open."""
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def on(self, owner: Any, name: str, part: Any) -> Any:
        """Returns a context in which calls of a function are counted for a part.

        Args:
          owner, name: where the function is an attribute, and which.
          part: the part, or what returns it when the function is called.
        """
        before = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            with self.part(part() if callable(part) else part):
                return before(*args, **options)

        return mock.patch.object(owner, name, timed)


def parts(spec: Spec, dataset: Dataset, steps: int) -> dict[str, Any]:
    """Measures one replicate of an experiment, without controls, by its parts.

    Where steps and evaluations are one call, evaluations are as many as there are rows, and one
    takes as long as it does by itself.

    Args:
      spec: the experiment.
      dataset: inputs and labels.
      steps: of each of its trainings.

    Returns:
      Seconds of each of PARTS: importing lth_tf in a process of its own; making the network and
      the graphs; the first call of each graph, which compiles; steps; evaluations; files, logs
      included; and what is left.
    """
    spec = dataclasses.replace(
        alone(spec), train_steps=steps, eval_every=min(spec.eval_every, steps), replicates=1,
        controls=(), control_levels=(), rewind_step=0,
    )  # fmt: skip
    seen: set[str] = set()
    trainers: list[Trainer] = []

    def first(kind: str) -> Any:
        def part() -> str:
            # One graph does both where there are blocks, and what is called first is an evaluation.
            new = kind not in seen and not (seen and trainers[0].engine.blocks)
            seen.add(kind)
            return "compile" if new else kind

        return part

    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import lth_tf.command"], check=True)
    imported = time.perf_counter() - began
    make = Trainer.__init__

    def noted(trainer: Any, *args: Any, **options: Any) -> None:
        make(trainer, *args, **options)
        trainers.append(trainer)

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        clock = Clock()
        clock.seconds["import"] = imported
        stack.enter_context(mock.patch.object(Trainer, "__init__", noted))
        for owner, name, part in (
            (Trainer, "__init__", "network"), (Trainer, "evaluate", first("evaluate")),
            (Trainer, "advance", first("train")), (Graph, "course", first("train")),
            (experiments.Laboratory, "write", "write"),
        ):  # fmt: skip
            stack.enter_context(clock.on(owner, name, part))
        experiments.run(spec, Path(folder), dataset)
        clock.turn()
    (trainer,) = trainers
    if trainer.engine.blocks:
        seconds = alternate({"": lambda: trainer.evaluate("validation")}, 5)[""]
        each = statistics.median(seconds)
        trainings = len(experiments.plan(spec, dataset.input_shape, dataset.classes).densities)
        moved = min(each * trainings * (steps // spec.eval_every), clock.seconds["train"])
        clock.seconds["train"] -= moved
        clock.seconds["evaluate"] += moved
    return {"model": spec.model, "dataset": spec.dataset, "steps": steps, "seconds": clock.seconds}


def parts_table(result: dict[str, Any]) -> Table:
    """Returns what `parts` returned as a table."""
    whole = sum(result["seconds"].values())
    title = f"{result['model']} on {result['dataset']}, {result['steps']:,} steps a training"
    table = Table(title=f"{title}: {whole:.1f} s")
    for name in ("part", "seconds", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part, seconds in result["seconds"].items():
        table.add_row(part, f"{seconds:.2f}", f"{seconds / whole:.0%}")
    return table
