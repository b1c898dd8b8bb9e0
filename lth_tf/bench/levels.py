"""How long a level takes as its density falls, on each engine."""

from __future__ import annotations

import contextlib
import functools
import statistics
from pathlib import Path
from typing import Any

from rich.table import Table

from lth_tf import masks, pruning, storage
from lth_tf.bench.rounds import Contender, alone, alternate, initial, ratio
from lth_tf.datasets import Dataset, Streamed
from lth_tf.errors import UserError
from lth_tf.execution import Execution
from lth_tf.masks import Mask
from lth_tf.scopes import SCOPES
from lth_tf.spec import Spec
from lth_tf.tickets import load_ticket
from lth_tf.training import Trainer, Weights

CONTENDERS = {
    "tensorflow": Execution(compact="off"),
    "compact": Execution(compact="on"),
    "sparse": Execution("sparse"),
}
DENSITIES = 1.0, 0.5, 0.2, 0.1, 0.05, 0.036, 0.01


def levels(
    spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int, tickets: Path | None = None
) -> dict[str, Any]:
    """Compares trainings at falling densities, evaluations included, with the dense one.

    Masks are those of magnitude pruning at initialisation, of each kernel by itself, or those of
    tickets.

    Args:
      spec: model, optimizer, batch size, precision, eval_every.
      dataset: inputs and labels.
      steps: of each training.
      rounds: how often each is done.
      tickets: a workdir whose tickets to train, those of its first replicate.

    Returns:
      For each engine that can train the network: seconds and ratio by density, medians; a ratio
      is that over the dense training in TensorFlow of the same round. To build graphs is no part
      of it: what compact training needs for each level is in its table of costs.

    Raises:
      UserError: there are no tickets, or not of that network.
    """
    spec = alone(spec)
    whole = Trainer(spec, dataset, execution=CONTENDERS["tensorflow"])
    given = _of_magnitude(whole) if tickets is None else _of_tickets(whole, tickets)
    trainers: dict[str, list[Trainer]] = {"tensorflow": [whole] * len(given)}
    for engine, execution in CONTENDERS.items():
        # A smaller network is built for each mask: one trainer would build it again and again.
        many = len(given) if engine == "compact" else 1
        if engine not in trainers:
            with contextlib.suppress(UserError):  # it cannot train this
                made = [Trainer(spec, dataset, execution=execution) for _ in range(many)]
                trainers[engine] = made * (len(given) // many)
    contenders: dict[tuple[str, int], Contender] = {
        (engine, i): functools.partial(trainers[engine][i].train, *each, 0, steps)
        for i, each in enumerate(given)
        for engine in trainers
    }
    seconds = alternate(contenders, rounds)
    found: dict[str, Any] = {engine: {} for engine in trainers}
    for (engine, i), measured in seconds.items():
        found[engine][str(round(masks.density(given[i][1]), 4))] = {
            "seconds": statistics.median(measured),
            "ratio": ratio(measured, seconds["tensorflow", 0]),
        }
    return {"model": spec.model, "dataset": spec.dataset, "engines": found}


def _of_magnitude(trainer: Trainer) -> list[tuple[Weights, Mask]]:
    """Weights and mask at each of DENSITIES, at initialisation."""
    weights, scores = initial(trainer)
    found = [masks.ones({name: s.shape for name, s in scores.items()})]
    found += [SCOPES["layerwise"](scores, density) for density in DENSITIES[1:]]
    return [(masks.apply(mask, weights), mask) for mask in found]


def _of_tickets(trainer: Trainer, workdir: Path) -> list[tuple[Weights, Mask]]:
    """Weights and mask of the dense network, and then of each ticket of a workdir."""
    paths = sorted(workdir.glob("replicate_*/*/ticket.safetensors"))
    first = [path for path in paths if path.parts[-3] == paths[0].parts[-3]]
    tickets = [load_ticket(path) for path in first if path.parent.name.startswith("level_")]
    below = sorted((t for t in tickets if t.level), key=lambda t: -masks.density(t.mask))
    if not below:
        raise UserError(f"{str(workdir)!r} has no tickets (replicate_*/level_*/ticket.safetensors)")
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(trainer.model).items()}
    for ticket in below:
        pruning.fit(ticket.mask, shapes, "mask")
    dense = masks.ones(shapes)
    weights = initial(trainer)[0]
    return [(weights, dense), *((t.weights, t.mask) for t in below)]


def levels_table(result: dict[str, Any]) -> Table:
    """Returns what `levels` returned as a table."""
    table = Table(title=f"{result['model']} on {result['dataset']}: a level over the dense one")
    table.add_column("density", justify="right")
    for engine in result["engines"]:
        table.add_column(engine, justify="right")
    for density in result["engines"]["tensorflow"]:
        found = (each[density] for each in result["engines"].values())
        table.add_row(f"{float(density):.1%}", *(f"{one['ratio']:.2f}" for one in found))
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
        densities = [float(density) for density in found]
        ratios = [one["ratio"] for one in found.values()]
        ax.plot([100 * d for d in densities], ratios, marker=marker, label=engine)
    ends = [densities[0], densities[-1]]
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
