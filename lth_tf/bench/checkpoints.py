"""What checkpoints cost a training."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from lth_tf import masks
from lth_tf.bench.rounds import initial
from lth_tf.compat import keras
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.training import State, Trainer
from lth_tf.training.checkpoints import save


class _Clock(keras.callbacks.Callback):
    """Notes when a training begins: a state's `seconds`, at which it is taken, count from then."""

    began = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        """Notes it."""
        self.began = time.perf_counter()


def checkpoints(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Measures what checkpoints cost a training, on the file system of temporary files.

    Args:
      spec: the experiment, with its checkpoint_every.
      dataset: inputs and labels.
      steps: of a training, evaluations included.
      rounds: how many trainings.

    Returns:
      checkpoints (of a training), seconds_per_checkpoint (median) and its megabytes; seconds
      of a training (median); share, of those in checkpoints.
    """
    trainer = Trainer(spec, dataset)
    weights, scores = initial(trainer)
    mask = masks.ones({name: score.shape for name, score in scores.items()})
    trainer.train(weights, mask, 0, min(steps, spec.eval_every))  # traces and compiles
    clock, taken = _Clock(), []
    seconds, size = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def keep(state: State) -> None:
            save(folder, state)
            taken.append(time.perf_counter() - (clock.began + state.seconds))

        for _ in range(rounds):
            began = time.perf_counter()
            trainer.train(weights, mask, 0, steps, callbacks=[clock], keep=keep)
            seconds.append(time.perf_counter() - began)
        size = max((path.stat().st_size for path in folder.iterdir()), default=0)
    if not taken:
        raise UserError(f"no checkpoint within {steps} steps; give --block more than that")
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "steps": steps,
        "checkpoints": len(taken) // rounds,
        "seconds_per_checkpoint": statistics.median(taken),
        "megabytes": size / 2**20,
        "seconds": statistics.median(seconds),
        "share": sum(taken) / sum(seconds),
    }


def checkpoints_table(result: dict[str, Any]) -> Table:
    """Returns what `checkpoints` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}, {result['steps']:,} steps")
    for column in ("seconds", "checkpoints", "seconds each", "MB each", "share of the time"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['seconds']:.1f}",
        f"{result['checkpoints']}",
        f"{result['seconds_per_checkpoint']:.3f}",
        f"{result['megabytes']:.1f}",
        f"{result['share']:.2%}",
    )
    return table
