"""TensorBoard logs of a training."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lth_tf import edge, masks, pruning
from lth_tf.compat import keras, tf


class Summaries(keras.callbacks.Callback):
    """Writes a training's logs for TensorBoard.

    At every evaluation all numbers in the logs (losses, accuracies, learning rate);
    at the beginning the density in total and of every kernel; on request a histogram
    of the kept weights of every kernel at every evaluation.

    Args:
      log_dir: folder for the event file.
      histograms: whether to write histograms.
      bytes_per_step: what each replica gives to be added up in a step; 0 is not written.

    Attributes:
      looks: whether it looks at the model's variables while it trains.
    """

    def __init__(
        self, log_dir: str | os.PathLike, *, histograms: bool = False, bytes_per_step: int = 0
    ):
        super().__init__()
        self.bytes_per_step = bytes_per_step
        self.log_dir, self.histograms = os.fspath(edge.folder(log_dir)), histograms
        self.looks = histograms
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Opens the file and writes densities."""
        self._writer = tf.summary.create_file_writer(self.log_dir)
        step = int(keras.backend.get_value(self.model.optimizer.iterations))
        with self._writer.as_default(step):
            mask = pruning.get_mask(self.model)
            for name, value in _densities(mask, self.bytes_per_step).items():
                tf.summary.scalar(name, value)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Writes the logs."""
        logs = logs or {}
        iterations = int(keras.backend.get_value(self.model.optimizer.iterations))
        step = logs.get("step", iterations)
        with self._writer.as_default(step):
            for name, value in _numbers(logs).items():
                tf.summary.scalar(name, value)
            if self.histograms:
                mask = pruning.get_mask(self.model)
                for name, kernel in pruning.kernels(self.model).items():
                    tf.summary.histogram(f"kept/{name}", kernel.numpy()[mask[name] != 0])

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the file."""
        self._writer.close()


def write(
    log_dir: str | os.PathLike,
    mask: masks.Mask,
    rows: Sequence[Mapping[str, Any]],
    *,
    bytes_per_step: int = 0,
    more: Iterable[tuple[int, Mapping[str, float]]] = (),
) -> None:
    """Writes what `Summaries` would have written of a training that is over, without histograms.

    Args:
      log_dir: folder for the event file.
      mask: kernel name -> 0/1 array.
      rows: the evaluations, the first one before the first step.
      bytes_per_step: see `Summaries`.
      more: (step, name -> number).
    """
    begins = rows[0]["step"], _densities(mask, bytes_per_step)
    add(log_dir, [begins, *((row["step"], _numbers(row)) for row in rows[1:]), *more])


def add(log_dir: str | os.PathLike, more: Iterable[tuple[int, Mapping[str, float]]]) -> None:
    """Writes numbers into a file of their own beside those that there are.

    Args:
      log_dir: folder for the event file.
      more: (step, name -> number).
    """
    from tensorboard.summary import Writer  # needs no graph for each number: five times as fast

    writer = Writer(os.fspath(log_dir))
    for step, numbers in more:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
    writer.flush()  # raises what its thread met, which close does not
    writer.close()


def _densities(mask: masks.Mask, bytes_per_step: int) -> dict[str, float]:
    """What is written at the beginning."""
    found = {"density/total": masks.density(mask)}
    found |= {f"density/{name}": float(np.mean(m)) for name, m in mask.items()}
    return found | ({"communication/bytes_per_step": bytes_per_step} if bytes_per_step else {})


def _numbers(logs: Mapping[str, Any]) -> dict[str, float]:
    """What is written of an evaluation."""
    return {name: v for name, v in logs.items() if name != "step" and v is not None}
