"""Whether tickets are stable: two trainings in different orders, and the line between their ends.

Frankle et al. 2020 ("Linear mode connectivity and the lottery ticket hypothesis"): a network is
stable from a step on where two copies that are trained from there in different orders end in one
valley, the error on the straight line between them no higher than at its ends. The second copy is
the control 'other_order'.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lth_tf.analysis import landscape
from lth_tf.analysis.comparison import require_alike
from lth_tf.errors import UserError
from lth_tf.experiments.looking import lookers
from lth_tf.experiments.workdirs import read_spec
from lth_tf.spec import Spec
from lth_tf.tasks import TASKS
from lth_tf.tickets import load_ticket, solution

OTHER = "branch_other_order"
STABLE = 0.02  # instability of the error below which a network is called stable (section 3)


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two trainings of one ticket.

    Attributes:
      rewind_step: from which they are trained.
      level, density, replicate: of the ticket.
      one, other: path -> array, what they ended with.
    """

    rewind_step: int
    level: int
    density: float
    replicate: int
    one: landscape.Weights
    other: landscape.Weights


def pairs(workdirs: Sequence[Path]) -> tuple[Spec, list[Pair]]:
    """Returns the spec of the first workdir, and each ticket that was trained in two orders.

    Args:
      workdirs: experiments that differ in how masks are found, or from which step they are trained.

    Raises:
      UserError: they differ in more, or no ticket has the control.
    """
    if not workdirs:
        raise UserError("no workdirs given; there must be at least one")
    first, found = read_spec(workdirs[0]), []
    for work in workdirs:
        require_alike(work, read_spec(work), workdirs[0], first)
        for path in sorted(work.glob(f"replicate_*/level_*/{OTHER}/trained.safetensors")):
            folder = path.parent.parent
            if not (folder / "trained.safetensors").exists():
                continue
            ticket = load_ticket(folder / "ticket.safetensors")
            one = solution(folder / "trained.safetensors", ticket)
            control = load_ticket(path.with_name("ticket.safetensors"))
            other = solution(path, control)
            found.append(
                Pair(ticket.rewind_step, ticket.level, one.density, ticket.origin["replicate"],
                     one.weights, other.weights)
            )  # fmt: skip
    if not found:
        raise UserError(
            f"no ticket of {', '.join(map(str, workdirs))} was trained in two orders: run "
            f"lth-branch --workdir={workdirs[0]} --branch=other_order"
        )
    return first, found


def instability(
    spec: Spec, found: Sequence[Pair], dataset: Any, *, examples: int = 5000, points: int = 30,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Returns a row for each pair, and one for each point of the line between its two ends.

    Instability is the highest error on the line less the mean of those at its ends (section 2);
    likewise of the loss. BatchNormalization's statistics are taken anew at each point, of the
    training examples.

    Args:
      spec, found: see `pairs`.
      dataset: inputs and labels, in memory.
      examples: of the training part, drawn once; of the test part all.
      points: of a line, its ends included.
      say: told of each pair.

    Raises:
      UserError: a data set on disk, or numbers out of range.
    """
    train, test = lookers(spec, dataset, examples, points, 3, anew=True)
    higher = TASKS[dataset.task].higher

    def measured(weights: landscape.Weights) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, looker in (("train", train), ("test", test)):
            loss, metric = looker.measured(weights)
            found |= {f"{name}_loss": loss, f"{name}_error": 1 - metric if higher else metric}
        return found

    rows, lines = [], []
    for pair in found:
        about = {
            "rewind_step": pair.rewind_step, "level": pair.level, "density": pair.density,
            "replicate": pair.replicate,
        }  # fmt: skip
        say(", ".join(f"{name} {value:.4g}" for name, value in about.items()))
        shares, values = np.linspace(0, 1, points).tolist(), []
        for share in shares:
            at = landscape.between(pair.one, pair.other, share)
            values.append(measured(at))
            lines.append({**about, "share": share, **values[-1]})
        rows.append({
            **about,
            **{
                f"{column}_instability": max(v[column] for v in values)
                - (values[0][column] + values[-1][column]) / 2
                for column in values[0]
            },
        })  # fmt: skip
    return rows, lines
