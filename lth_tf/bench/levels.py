"""How long a level takes as its density falls, on each engine."""

from __future__ import annotations

import functools
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from lth_tf import masks, storage
from lth_tf.bench.rounds import Contender, alone, alternate, initial, ratio
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.scopes import SCOPES
from lth_tf.spec import Spec
from lth_tf.training import Trainer

CONTENDERS = {
    "tensorflow": Execution(compact="off"),
    "compact": Execution(compact="on"),
    "sparse": Execution("sparse"),
}
DENSITIES = 1.0, 0.5, 0.2, 0.1, 0.05, 0.036, 0.01


def levels(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares trainings at falling densities, evaluations included, with the dense one.

    Masks are those of magnitude pruning at initialisation, of each kernel by itself.

    Args:
      spec: model, optimizer, batch size, precision, eval_every.
      dataset: inputs and labels.
      steps: of each training.
      rounds: how often each is done.

    Returns:
      For each engine that can train the network: seconds and ratio by density, medians; a ratio
      is that over the dense training in TensorFlow of the same round. To build graphs is no part
      of it: what compact training needs for each level is in its table of costs.
    """
    spec = alone(spec)
    trainers: dict[str, list[Trainer]] = {}
    for engine, execution in CONTENDERS.items():
        # A smaller network is built for each mask: one trainer would build it again and again.
        many = len(DENSITIES) if engine == "compact" else 1
        try:
            made = [Trainer(spec, dataset, execution=execution) for _ in range(many)]
        except UserError:
            if engine == "tensorflow":  # the network itself cannot be trained so
                raise
            continue
        trainers[engine] = made * (len(DENSITIES) // many)
    weights, scores = initial(trainers["tensorflow"][0])
    dense = masks.ones({name: s.shape for name, s in scores.items()})

    def training(trainer: Trainer, density: float) -> Contender:
        mask = SCOPES["layerwise"](scores, density) if density < 1 else dense
        return functools.partial(trainer.train, masks.apply(mask, weights), mask, 0, steps)

    contenders = {
        (engine, density): training(trainers[engine][i], density)
        for i, density in enumerate(DENSITIES)
        for engine in trainers
    }
    seconds = alternate(contenders, rounds)
    result: dict[str, Any] = {"model": spec.model, "dataset": spec.dataset, "engines": {}}
    for engine in trainers:
        result["engines"][engine] = {
            str(density): {
                "seconds": statistics.median(seconds[engine, density]),
                "ratio": ratio(seconds[engine, density], seconds["tensorflow", 1.0]),
            }
            for density in DENSITIES
        }
    return result


def levels_table(result: dict[str, Any]) -> Table:
    """Returns what `levels` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}: a level over the dense one")
    table.add_column("density", justify="right")
    for engine in result["engines"]:
        table.add_column(engine, justify="right")
    for density in DENSITIES:
        found = (each[str(density)] for each in result["engines"].values())
        table.add_row(f"{density:.1%}", *(f"{one['ratio']:.2f}" for one in found))
    return table


def levels_figure(result: dict[str, Any], path: Path) -> None:
    """Draws what `levels` returned: time against density, beside time in proportion to it.

    Args:
      result: what `levels` returned.
      path: file to write, a PNG.

    Raises:
      UserError: it cannot be written.
    """
    import matplotlib.figure  # a second, which not every command has to spend
    import matplotlib.ticker

    drawing = matplotlib.figure.Figure(figsize=(6.4, 4.4), layout="constrained")
    ax = drawing.subplots()
    for marker, (engine, found) in zip("os^v", result["engines"].items(), strict=False):
        ratios = [found[str(density)]["ratio"] for density in DENSITIES]
        ax.plot([100 * d for d in DENSITIES], ratios, marker=marker, label=engine)
    ends = [DENSITIES[0], DENSITIES[-1]]
    ax.plot([100 * d for d in ends], ends, "k:", label="proportional to density")
    ax.set(xscale="log", yscale="log", xlabel="weights kept (%)")
    ax.set_ylabel("time of a training over the dense one in TensorFlow")
    ax.set_title(f"{result['model']} on {result['dataset']}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        axis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.invert_xaxis()
    ax.grid(alpha=0.3)
    ax.legend()
    with storage.explained(path):
        drawing.savefig(path, dpi=110, format="png")
