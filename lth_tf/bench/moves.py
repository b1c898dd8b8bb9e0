"""What it costs that masks move: each method beside a random mask that stays."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import statistics
import tempfile
import time
from typing import Any

from rich.table import Table

from lth_tf import pruning
from lth_tf.bench.memory import own_peak, peak_of
from lth_tf.bench.rounds import Contender, alone, alternate, ratio
from lth_tf.datasets import Dataset, Streamed
from lth_tf.dynamic import METHODS
from lth_tf.dynamic.methods import OPTIONS
from lth_tf.errors import UserError
from lth_tf.execution import Decision, Execution
from lth_tf.experiments import growing
from lth_tf.masks import ones
from lth_tf.models import Blueprint
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec
from lth_tf.tickets import Ticket
from lth_tf.training import Trainer

ENGINES = {"tensorflow": Execution(compact="off"), "sparse": Execution("sparse")}


def sparse(spec: Spec, dataset: Dataset | Streamed, steps: int, rounds: int) -> dict[str, Any]:
    """Compares trainings of each method, evaluations included, with those of `static`.

    Args:
      spec: of the recipe 'sparse'; of its densities the first.
      dataset: inputs and labels.
      steps: of each training.
      rounds: how often each is done.

    Returns:
      For each engine that can train it, and each method: seconds and how many times the steps per
      second of static, medians; milliseconds of an update by itself; and the peak memory in MB of
      a process of its own that does one such training on a few examples (not for data on disk).

    Raises:
      UserError: no update in so many steps.
    """
    spec = dataclasses.replace(alone(spec), train_steps=steps)
    result: dict[str, Any] = {"model": spec.model, "dataset": spec.dataset, "engines": {}}
    made = {engine: _contenders(spec, dataset, how) for engine, how in ENGINES.items()}
    contenders = {(e, m): run for e, found in made.items() for m, (run, _) in found.items()}
    seconds = alternate(contenders, rounds)
    for engine, method in contenders:
        times = seconds[engine, method]
        result["engines"].setdefault(engine, {})[method] = {
            "seconds": statistics.median(times),
            "speed": ratio(seconds[engine, "static"], times),
            "update_ms": made[engine][method][1](),
        }
    if isinstance(dataset, Dataset):
        for engine, method in contenders:
            peak = _memory(_of(spec, method), dataset, engine)
            result["engines"][engine][method]["peak_memory_mb"] = peak
    return result


def _memory(spec: Spec, dataset: Dataset, engine: str) -> float:
    count = spec.batch_size
    few = dataclasses.replace(
        dataset, train_inputs=dataset.train_inputs[: 4 * count],
        train_labels=dataset.train_labels[: 4 * count],
        test_inputs=dataset.test_inputs[:count], test_labels=dataset.test_labels[:count],
    )  # fmt: skip
    spec = dataclasses.replace(spec, validation_size=count, eval_every=spec.train_steps)
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        pickle.dump((spec.as_dict(), few, engine), file)
        file.flush()
        return peak_of("lth_tf.bench.moves:once", file.name)


def once(path: str) -> None:
    """Trains a contender of `sparse` once, and prints the peak memory of this process in MB.

    Args:
      path: a pickle of its spec as `Spec.as_dict` returns it, its data set, and the engine.
    """
    with open(path, "rb") as file:
        given, dataset, engine = pickle.load(file)
    spec = Spec.from_dict(given)
    blueprint = Blueprint(spec, tuple(dataset.input_shape), dataset.classes)
    _contender(spec, Trainer(spec, dataset, execution=ENGINES[engine]), blueprint)[0]()
    print(own_peak())


def _of(spec: Spec, method: str) -> Spec:
    """The spec with another method, and only those options that mean something to it."""
    about = METHODS[method]
    kept = {name: getattr(spec, name) for name in OPTIONS if about.has(name)}
    blank = {name: Spec.default_of(name) for name in OPTIONS}
    return dataclasses.replace(spec, **{**blank, **kept, "method": method})


def _contenders(
    spec: Spec, dataset: Dataset | Streamed, execution: Execution
) -> dict[str, tuple[Contender, Any]]:
    """Method -> what trains it, and what tells the milliseconds of an update; {}: none can be."""
    found: dict[str, tuple[Contender, Any]] = {}
    blueprint = Blueprint(spec, tuple(dataset.input_shape), dataset.classes)
    for method in METHODS:
        own = _of(spec, method)
        with contextlib.suppress(UserError):  # this engine cannot train it
            trainer = Trainer(own, dataset, execution=execution)
            found[method] = _contender(own, trainer, blueprint)
    return found if "static" in found else {}


def _contender(spec: Spec, trainer: Trainer, blueprint: Blueprint) -> tuple[Contender, Any]:
    shapes = {name: tuple(v.shape) for name, v in pruning.kernels(trainer.model).items()}
    origin = {"seed": spec.seed, "replicate": 0, "arm": "ticket"}
    dense = Ticket(ones(shapes), blueprint.initial(spec.seed), 0, 0, origin, spec)
    density = RECIPES[spec.recipe].levels(spec, shapes, {}).densities[1]
    ticket = growing.sown(dense, density, 1)
    moves = METHODS[spec.method].moves
    mover = growing.mover(ticket, blueprint) if moves else None

    def run() -> None:
        trainer.train(ticket.weights, ticket.mask, 0, spec.train_steps, mover=mover)

    def update() -> float | None:
        if mover is None:
            return None
        graph = trainer.engines.of(Decision())
        pruning.set_mask(trainer.model, ticket.mask, trainer.optimizer)
        mover.begin(trainer.model, trainer.optimizer, ticket.mask, graph)
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            mover.update(mover.course.first, spec.seed)
            taken.append(1000 * (time.perf_counter() - began))
        return statistics.median(taken)

    return run, update


def sparse_table(result: dict[str, Any]) -> Table:
    """Returns what `sparse` returned as a table."""
    title = f"{result['model']} on {result['dataset']}: steps per second and memory over static"
    table = Table(title=title)
    memory = [f"memory, {engine}" for engine in result["engines"]]
    for name in ("method", *result["engines"], "an update", *memory):
        table.add_column(name, justify="left" if name == "method" else "right")
    for method in METHODS:
        cells = [found.get(method) for found in result["engines"].values()]
        if not any(cells):
            continue
        took = next((c["update_ms"] for c in cells if c), None)
        table.add_row(
            method, *(f"{c['speed']:.2f}" if c else "" for c in cells),
            "" if took is None else f"{took:.1f} ms", *_peaks(result, method),
        )  # fmt: skip
    return table


def _peaks(result: dict[str, Any], method: str) -> list[str]:
    """A cell for each engine: peak memory, of static in MB, of others as a multiple of it."""
    cells = []
    for found in result["engines"].values():
        peak = found.get(method, {}).get("peak_memory_mb")
        if peak is None:
            cells.append("")
        elif method == "static":
            cells.append(f"{peak:,.0f} MB")
        else:
            cells.append(f"{peak / found['static']['peak_memory_mb']:.2f}")
    return cells
