"""Measurements of streamed input: whether it keeps up with training, and what memory it takes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.table import Table

from lth_tf.bench.memory import sampled
from lth_tf.bench.rounds import ratio
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, Streamed
from lth_tf.datasets import stream as streams
from lth_tf.errors import UserError
from lth_tf.spec import Spec
from lth_tf.training import Trainer
from lth_tf.training.feeds import CHUNK, Streaming

WARM = 2 * streams.AHEAD + 1  # steps not measured: buffers are filled, or emptied


class _Still(Streaming):
    """A feed that gives one batch of the stream again and again, out of memory."""

    _again: Any = None

    def begin(self, step: int, end: int, seed: int) -> tuple:
        """Returns an iterator over the same batch without end."""
        if self._again is None:
            # The stream goes with the feed that read it.
            (source,) = Streaming(self.dataset, self.spec, self.strategy).begin(0, 1, seed)
            batch = tf.data.Dataset.from_tensors(source.get_next())
            self._again = iter(batch.repeat())
        return (self._again,)


def stream(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares input alone, training alone and training from the stream, in one process.

    input: batches are read, decoded and let go, the middle of images; input_resized_crop:
    random parts of them. training: the spec's, dense, on one batch that stays in memory;
    training_streamed: the same from the stream. They alternate; each begins a stream of
    its own, which ends with it, and does some steps before it is measured.

    Then two epochs are trained from the stream and the process's resident memory looked at
    at short intervals, in each from its first steps on to its end. In an epoch's last
    SHUFFLE records the shuffle buffers run empty.

    Args:
      spec: model, batch size, augmentation, optimizer, distribution.
      dataset: on disk.
      steps: how many each contender does per round.
      rounds: how often.

    Returns:
      images_per_second by name (medians); ratio_streamed, the median over rounds of the
      speed of training from the stream over that of training alone; memory_mb: highest and
      lowest of the second epoch, spread (highest - lowest) while its buffers are full,
      growth_per_1000_images (of the highest, from the first epoch to the second); None where
      the system does not tell.

    Raises:
      UserError: the data set is not streamed, or an epoch has too few steps.
    """
    if not isinstance(dataset, Streamed):
        raise UserError(f"dataset {spec.dataset!r} lies in memory; give one that is streamed")
    trainer = Trainer(spec, dataset)
    strategy, streamed = trainer.strategy, trainer.feed
    per_epoch = streamed.sizes["train"] // spec.batch_size
    if per_epoch <= WARM:
        raise UserError(
            f"an epoch of {spec.dataset!r} has {per_epoch} steps of batch_size {spec.batch_size}; "
            f"more than {WARM} are needed: lower --batch_size"
        )

    def train(first: int, end: int) -> None:
        # In one block for all contenders, as long as a training's may be.
        for step in range(first, end, block):
            trainer.advance(step, min(step + block, end), spec.seed)

    def reading(augmentation: str) -> Callable[[], float]:
        own = dataclasses.replace(spec, augmentation=augmentation)

        def run() -> float:
            feed = Streaming(dataset, own, strategy)
            with feed.reading():
                source = feed.begin(0, WARM + steps, spec.seed)
                for _ in range(WARM):
                    feed.take(source, 0)
                began = time.perf_counter()
                for _ in range(steps):
                    feed.take(source, 0)
                return time.perf_counter() - began

        return run

    def training(kind: type[Streaming]) -> Callable[[], float]:
        def run() -> float:
            trainer.feed = kind(dataset, spec, strategy)
            train(0, WARM)
            began = time.perf_counter()
            train(WARM, WARM + steps)
            taken = time.perf_counter() - began
            trainer.feed = streamed
            return taken

        return run

    block = min(CHUNK, spec.eval_every)
    contenders = {
        "input": reading("none"),
        "input_resized_crop": reading("resized_crop"),
        "training": training(_Still),
        "training_streamed": training(Streaming),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            taken = run()
            if i:  # the first compiles, and fills the system's file cache
                seconds[name].append(taken)
    images = steps * spec.batch_size
    return {
        "model": spec.model,
        "dataset": spec.dataset,
        "batch_size": spec.batch_size,
        "images_per_second": {
            name: images / statistics.median(values) for name, values in seconds.items()
        },
        "ratio_streamed": ratio(seconds["training"], seconds["training_streamed"]),
        "images_of_epoch": per_epoch * spec.batch_size,
        "memory_mb": _memory(train, per_epoch, spec.batch_size),
    }


def _memory(train: Callable[[int, int], None], per_epoch: int, batch: int) -> dict | None:
    """Trains two epochs; returns what `stream` says of memory."""
    highest = []
    for first in (0, per_epoch):
        train(first, first + WARM)
        with sampled() as samples:
            train(first + WARM, first + per_epoch)
        if not samples:
            return None
        at, size = np.array(samples).T
        highest.append(float(size.max()))
    left = (at[-1] - at) / max(at[-1] - at[0], 1e-9) * (per_epoch - WARM) * batch
    full = left >= min(streams.SHUFFLE, left[0] / 2)
    return {
        "highest": highest[-1],
        "lowest": float(size.min()),
        "spread": float(np.ptp(size[full])),
        "growth_per_1000_images": 1000 * (highest[1] - highest[0]) / (per_epoch * batch),
    }


def stream_table(result: dict[str, Any]) -> Table:
    """Returns what `stream` returned as a table."""
    rates, memory = result["images_per_second"], result["memory_mb"]
    said = (
        "resident memory over the second epoch: {lowest:,.0f} to {highest:,.0f} MB; while the "
        "shuffle buffers are full within {spread:,.0f} MB; growth from epoch to epoch "
        "{growth_per_1000_images:+.2f} MB per 1,000 images"
    )
    about = f"batch {result['batch_size']}; an epoch has {result['images_of_epoch']:,} images"
    table = Table(
        title=f"{result['model']} on {result['dataset']}, {about}",
        caption=said.format(**memory) if memory else "resident memory: unknown on this system",
    )
    for column in ("", "images per second", "of training alone"):
        table.add_column(column, justify="right" if column else "left")
    for name, rate in rates.items():
        share = rate / rates["training"]
        if name == "training_streamed":
            share = result["ratio_streamed"]
        table.add_row(name, f"{rate:,.0f}", f"{share:.2f}x")
    return table
