"""One replica compared with two, and what the two send each other."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from rich.table import Table

from lth_tf import distribute, masks, pruning
from lth_tf.bench.rounds import advancing, alone, alternate, initial, rate_text, ratio
from lth_tf.datasets import Dataset, Streamed
from lth_tf.scopes import SCOPES
from lth_tf.spec import Spec
from lth_tf.training import Trainer

DENSITIES = 1.0, 0.2, 0.05


def two_replicas(spec: Spec) -> Spec:
    """Returns the spec on two devices, which it makes of a CPU where nothing is computed yet."""
    two = dataclasses.replace(spec, distribute="mirrored", devices=2, compile="off")
    return distribute.resolve(two)


def scale(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares one replica with two, which add up all of their gradients or what a mask keeps.

    Without GPUs the two are logical CPUs on the same cores, so that what two replicas
    gain is not to be seen there; what packing gains or costs is.

    Args:
      spec: model, optimizer, batch size, precision.
      dataset: inputs and labels.
      steps: how many each contender does per round.
      rounds: how often.

    Returns:
      steps_per_second and bytes_per_step by name (replicas, way, density); ratio_packed
      by density, the median over rounds of packed over plain speed; payload, the
      bytes of packed over those of the kept entries and the other trainable weights alone.
    """
    one = Trainer(dataclasses.replace(alone(spec), compile="off"), dataset)
    trainers = {"1": one}
    for way in ("plain", "packed"):
        trainers[f"2 {way}"] = Trainer(
            dataclasses.replace(two_replicas(spec), communication=way), dataset
        )
    weights, scores = initial(one)
    trainable = {id(v) for v in one.model.trainable_variables}
    width = 8 if spec.precision == "float64" else 4
    others = sum(
        weights[name].size
        for name, v in pruning.weights(one.model).items()
        if id(v) in trainable and name not in scores
    )
    result: dict[str, Any] = {
        "model": spec.model,
        "dataset": spec.dataset,
        "batch_size": spec.batch_size,
        "steps_per_second": {},
        "bytes_per_step": {},
        "ratio_packed": {},
        "payload": {},
    }
    for density in DENSITIES:
        mask = SCOPES["layerwise"](scores, density)
        for trainer in trainers.values():
            trainer.train(masks.apply(mask, weights), mask, 0, 0)  # puts them in
        contenders = {name: advancing(trainer, steps) for name, trainer in trainers.items()}
        seconds = alternate(contenders, rounds)
        for name, values in seconds.items():
            key = f"{name}, density {density:g}"
            result["steps_per_second"][key] = steps / statistics.median(values)
            result["bytes_per_step"][key] = trainers[name].reduction.bytes(mask)
        result["ratio_packed"][f"{density:g}"] = ratio(seconds["2 plain"], seconds["2 packed"])
        least = width * (masks.kept(mask) + others)
        packed = trainers["2 packed"].reduction.bytes(mask)
        result["payload"][f"{density:g}"] = packed / least
    return result


def scale_table(result: dict[str, Any]) -> Table:
    """Returns what `scale` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}, batch {result['batch_size']}")
    table.add_column("replicas", no_wrap=True)
    for column in ("steps per second", "bytes per step", "packed over plain", "over kept entries"):
        table.add_column(column, justify="right")
    for name, rate in result["steps_per_second"].items():
        packed, density = "packed" in name, name.split()[-1]
        table.add_row(
            name,
            rate_text(rate),
            f"{result['bytes_per_step'][name]:,}",
            f"{result['ratio_packed'][density]:.2f}x" if packed else "",
            f"{result['payload'][density]:.4f}x" if packed else "",
        )
    return table
