"""Training loops compared: this package's, `fit`, and `fit` as tfmot prunes."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from rich.table import Table

from lth_tf import masks, models, pruning
from lth_tf.bench.rounds import Contender, advancing, alone, alternate, initial, rate_text, ratio
from lth_tf.compat import keras, tf, tfmot
from lth_tf.datasets import Dataset, Streamed, scaling
from lth_tf.errors import UserError
from lth_tf.scopes import SCOPES
from lth_tf.spec import Spec
from lth_tf.training import OPTIMIZERS, Trainer, policy

DENSITY = 0.2


def train(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares training loops on the same model, data, batch size and optimizer.

    lth_tf: this package's loop, a mask of density 0.2 in force. fit: `model.fit` of the
    plain Keras model on normalised float32 NumPy arrays. fit_100: the same with
    steps_per_execution=100, and jit_compile where it is not hopeless (CPU convolutions).
    tfmot_fit: `prune_low_magnitude` at the same density under `fit`.

    Args:
      spec: model, optimizer, batch size, precision.
      dataset: inputs and labels.
      steps: how many each contender does per round.
      rounds: how often.

    Returns:
      steps_per_second by name (medians), and ratio_NAME, the median over rounds of
      lth_tf's speed over the other's.
    """
    if isinstance(dataset, Streamed):
        raise UserError(f"dataset {spec.dataset!r} is streamed; `fit` is fed from memory here")
    trainer = Trainer(alone(spec), dataset)
    weights, scores = initial(trainer)
    mask = SCOPES["layerwise"](scores, DENSITY)
    trainer.train(masks.apply(mask, weights), mask, 0, 0)  # puts them in

    inputs = scaling.scale(
        dataset.train_inputs, spec.normalization, dataset.mean, dataset.std, tf.float32
    ).numpy()
    repeats = -(-steps * spec.batch_size // len(inputs))
    x = np.concatenate([inputs] * repeats)[: steps * spec.batch_size]
    y = np.concatenate([dataset.train_labels] * repeats)[: steps * spec.batch_size]

    def plain() -> Any:
        with policy(spec.precision):
            return models.build(spec, trainer.input_shape, trainer.classes, spec.seed)

    def fit(model: Any, callbacks: tuple = (), **options: Any) -> Contender:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(OPTIMIZERS[spec.optimizer](spec.learning_rate, spec), loss, **options)
        return lambda: model.fit(
            x, y, batch_size=spec.batch_size, verbose=0, callbacks=list(callbacks)
        )

    compiled = "conv" not in pruning.kinds(trainer.model).values() or bool(
        tf.config.list_logical_devices("GPU")
    )
    schedule = tfmot.sparsity.keras.ConstantSparsity(1 - DENSITY, 0, frequency=100)
    wrapped = tfmot.sparsity.keras.prune_low_magnitude(plain(), pruning_schedule=schedule)
    seconds = alternate(
        {
            "lth_tf": advancing(trainer, steps),
            "fit": fit(plain()),
            "fit_100": fit(plain(), steps_per_execution=100, jit_compile=compiled),
            "tfmot_fit": fit(wrapped, (tfmot.sparsity.keras.UpdatePruningStep(),)),
        },
        rounds,
    )
    result: dict[str, Any] = {
        "model": spec.model,
        "dataset": spec.dataset,
        "batch_size": spec.batch_size,
        "fit_100_jit_compile": compiled,
        "steps_per_second": {
            name: steps / statistics.median(values) for name, values in seconds.items()
        },
    }
    for name in ("fit", "fit_100", "tfmot_fit"):
        result[f"ratio_{name}"] = ratio(seconds[name], seconds["lth_tf"])
    return result


def train_table(result: dict[str, Any]) -> Table:
    """Returns what `train` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}")
    for column in ("loop", "steps per second", "lth_tf is faster by"):
        table.add_column(column, justify="left" if column == "loop" else "right")
    for name, rate in result["steps_per_second"].items():
        faster = result.get(f"ratio_{name}")
        table.add_row(name, rate_text(rate), f"{faster:.2f}x" if faster else "")
    return table
