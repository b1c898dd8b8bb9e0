"""What lth-bench can measure: name -> how, and how it is shown."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from lth_tf import datasets
from lth_tf.bench import checkpoints, levels, loops, moves, parts, replicas, scores, start, stream
from lth_tf.errors import UserError
from lth_tf.spec import Spec


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One entry of MEASUREMENTS.

    Attributes:
      run: returns what can be written as JSON; it is given what its parameters name: spec,
        dataset, data_dir, steps (of a contender in a round), rounds, tickets.
      table: makes a table of that.
      recipe: of the spec.
      before: called with the spec, before anything is computed.
      figure: draws what `run` returned into a file, where there is something to draw.
    """

    run: Callable[..., dict[str, Any]]
    table: Callable[[dict[str, Any]], Table]
    recipe: str = "imp"
    before: Callable[[Spec], Any] = lambda spec: None
    figure: Callable[[dict[str, Any], Path], None] | None = None


MEASUREMENTS = {
    "train": Measurement(loops.train, loops.train_table),
    "levels": Measurement(levels.levels, levels.levels_table, figure=levels.levels_figure),
    "run": Measurement(parts.parts, parts.parts_table),
    "sparse": Measurement(moves.sparse, moves.sparse_table, recipe="sparse"),
    "start": Measurement(start.start, start.start_table),
    "scale": Measurement(replicas.scale, replicas.scale_table, before=replicas.two_replicas),
    "checkpoints": Measurement(checkpoints.checkpoints, checkpoints.checkpoints_table),
    "score": Measurement(scores.score, scores.score_table, recipe="one_shot"),
    "stream": Measurement(stream.stream, stream.stream_table),
}


def measure(
    which: Measurement, spec: Spec, data_dir: str | None, steps: int, rounds: int,
    tickets: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns what a measurement finds.

    Args:
      which: the entry of MEASUREMENTS.
      spec: the experiment that is measured.
      data_dir: folder of the data sets.
      steps: how many each contender does per round.
      rounds: how often each runs.
      tickets: a workdir whose tickets are measured.

    Raises:
      UserError: no such data set, or the measurement has nothing to measure with this spec.
    """
    if tickets is not None and "tickets" not in inspect.signature(which.run).parameters:
        raise UserError("--tickets: it is lth-bench levels that tickets are for")
    which.before(spec)
    # All need it: `start` finds it decoded, or fails here with one sentence.
    dataset = datasets.load(spec.dataset, data_dir)
    given = {
        "spec": spec, "dataset": dataset, "data_dir": data_dir, "steps": steps, "rounds": rounds,
        "tickets": tickets,
    }  # fmt: skip
    return which.run(**{name: given[name] for name in inspect.signature(which.run).parameters})
