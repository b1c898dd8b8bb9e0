"""Progress of an experiment on the terminal."""

from __future__ import annotations

import time
from typing import Any

import rich.console
import rich.progress

from lth_tf.compat import keras
from lth_tf.tasks import metric_of, task_of


class Steps(keras.callbacks.Callback):
    """Tells by `describe` what is being trained, and by `advance` how many steps more are done.

    Attributes:
      looks: that it does not look at variables.
    """

    looks = False
    _last = 0

    def describe(self, what: str) -> None:
        """Says what is being trained."""
        raise NotImplementedError

    def advance(self, steps: int) -> None:
        """So many steps more are done."""
        raise NotImplementedError

    def begin(self, what: str, first: int) -> None:
        """A training begins, at step `first` of its schedule."""
        self._last = first
        self.describe(what)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts the block's steps."""
        step = (logs or {})["step"]
        before, self._last = self._last, step
        self.advance(step - before)


class Progress(Steps):
    """Shows what is being trained, how far the experiment is and how long it will take.

    On a terminal it is a bar; elsewhere a line for each training that is finished.
    After the first seconds of training an estimate of the whole is printed.

    Args:
      console: where to write.
      steps: training steps of the whole experiment.
    """

    def __init__(self, console: rich.console.Console, steps: int):
        super().__init__()
        self.console, self.steps = console, steps
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("steps"),
            rich.progress.TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps)
        self._done = 0
        self._first: tuple[float, int] | None = None
        self._estimated = False

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a finding."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def skip(self, steps: int) -> None:
        """A training of so many steps need not be done again."""
        self.steps -= steps
        self._bar.update(self._task, total=self.steps)

    def finish(self, what: str, row: dict[str, Any]) -> None:
        """A training is finished; `row` is its summary."""
        if not self.console.is_terminal:
            metric = metric_of(row)
            form = task_of(metric).form
            early, end = (form.format(row[f"test_{metric}_{at}"]) for at in ("early", "end"))
            self.console.print(
                f"{what}: density {row['density']:.4f}, early stop at {row['early_stop_step']} "
                f"with {early}, end {end} "
                f"({row['seconds']:.1f} s, {self._done:,} of {self.steps:,} steps)",
                highlight=False,
                soft_wrap=True,
            )

    def describe(self, what: str) -> None:
        """Says what is being trained."""
        self._bar.update(self._task, description=what)

    def advance(self, steps: int) -> None:
        """So many steps more are done."""
        self._done += steps
        self._bar.update(self._task, completed=self._done)
        now = time.perf_counter()
        if self._first is None:  # the first block, which includes compiling, does not count
            self._first = now, self._done
        elif not self._estimated and now - self._first[0] > 3:
            self._estimated = True
            rate = (self._done - self._first[1]) / (now - self._first[0])
            minutes = (self.steps - self._done) / rate / 60
            remaining = (
                f"about {minutes / 60:.1f} h" if minutes >= 60
                else f"about {minutes:.0f} min" if minutes >= 1
                else "less than a minute"
            )  # fmt: skip
            self.console.print(
                f"{rate:,.0f} steps/s, evaluations included: {remaining} to go",
                highlight=False,
            )
