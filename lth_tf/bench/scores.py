"""What scores cost, in time and memory, in gradients of the same samples."""

from __future__ import annotations

import functools
import json
import statistics
from typing import Any

import numpy as np
from rich.table import Table

from lth_tf import models, pruning
from lth_tf.bench.memory import own_peak, peak_of
from lth_tf.bench.rounds import Contender, alone, alternate, ratio
from lth_tf.compat import tf
from lth_tf.datasets import Dataset, Streamed
from lth_tf.scorers import SCORERS
from lth_tf.scorers.network import Reused
from lth_tf.spec import Spec
from lth_tf.tasks import cross_entropy


def score(spec: Spec, dataset: Dataset | Streamed, rounds: int) -> dict[str, Any]:
    """Compares scorers with one gradient of the same samples, on random inputs.

    gradient: of the plain Keras model in training mode, its own BatchNormalization, in one
    tf.function. The others are the spec's scorers; grasp_10x has ten times the samples in
    ten micro-batches, synflow is one of its 100 rounds, all take the weights from the model and
    bring the scores back.

    Args:
      spec: model, samples_per_class, score_batch_size, temperature.
      dataset: whose shape of input and number of classes they have.
      rounds: how often.

    Returns:
      seconds by name (medians), ratio_seconds (median over rounds of the ratio to gradient),
      peak_memory_mb of a process of its own, and the same above one that only builds the model.
    """
    input_shape, classes = tuple(dataset.input_shape), dataset.classes
    contenders = _scorers(alone(spec), input_shape, classes)
    seconds = alternate({n: c for n, c in contenders.items() if n != "nothing"}, rounds)
    peaks = {}
    for name in contenders:
        arguments = map(json.dumps, (name, spec.as_dict(), input_shape, classes))
        peaks[name] = peak_of("lth_tf.bench.scores:once", *arguments)
    return {
        "model": spec.model,
        "samples": spec.samples_per_class * classes,
        "seconds_by_name": {name: statistics.median(s) for name, s in seconds.items()},
        "ratio_seconds": {
            name: ratio(s, seconds["gradient"]) for name, s in seconds.items()
        },
        "peak_memory_mb": peaks,
        "above_model_mb": {name: peak - peaks["nothing"] for name, peak in peaks.items()},
    }


def once(*arguments: str) -> None:
    """Runs a contender of `score` twice and prints the peak memory of this process in MB.

    Args:
      *arguments: as JSON: its name, the spec as `Spec.as_dict` returns it, the shape of the data
        set's inputs and the number of its classes.
    """
    name, spec, input_shape, classes = map(json.loads, arguments)
    contender = _scorers(Spec.from_dict(spec), tuple(input_shape), classes)[name]
    for _ in range(2):
        contender()
    print(own_peak())


def _scorers(spec: Spec, input_shape: tuple[int, ...], classes: int) -> dict[str, Contender]:
    model = models.build(spec, input_shape, classes, spec.seed)
    reused, kernels = Reused(model), pruning.kernels(model)
    samples, rng = spec.samples_per_class * classes, np.random.default_rng(0)

    @functools.cache
    def batches(factor: int) -> list:
        inputs = rng.normal(size=(samples * factor, *input_shape)).astype(np.float32)
        labels = (np.arange(samples * factor) % classes).astype(np.int32)
        parts = -(-samples * factor // spec.score_batch_size)
        return list(
            zip(np.array_split(inputs, parts), np.array_split(labels, parts), strict=True)
        )

    @tf.function
    def differentiate(inputs: Any, labels: Any) -> list:
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            loss = tf.reduce_mean(cross_entropy(labels, logits))
        return tape.gradient(loss, model.trainable_variables)

    def gradient() -> None:
        for inputs, labels in batches(1):
            for g in differentiate(tf.constant(inputs), tf.constant(labels)):
                g.numpy()

    def of(name: str, factor: int = 1) -> Contender:
        def run() -> None:
            values = {n: v.numpy() for n, v in kernels.items()}
            SCORERS[name](reused, values, batches(factor) if factor else None)

        return run

    return {
        "nothing": lambda: None,
        "gradient": gradient,
        "snip": of("snip"),
        "grasp": of("grasp"),
        "grasp_10x": of("grasp", 10),
        "synflow": of("synflow", 0),
        "magnitude": of("magnitude", 0),
        "random": of("random", 0),
    }


def score_table(result: dict[str, Any]) -> Table:
    """Returns what `score` returned as a table."""
    table = Table(title=f"{result['model']}, {result['samples']} samples")
    columns = "", "seconds", "of gradient", "peak memory MB", "above the model's", "of gradient"
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    above = result["above_model_mb"]
    unit = max(above["gradient"], 1.0)
    for name, peak in result["peak_memory_mb"].items():
        taken = result["seconds_by_name"].get(name)
        table.add_row(
            name,
            f"{taken:.2f}" if taken else "",
            f"{result['ratio_seconds'][name]:.2f}x" if taken else "",
            f"{peak:,.0f}",
            f"{above[name]:,.0f}",
            f"{above[name] / unit:.2f}x",
        )
    return table
