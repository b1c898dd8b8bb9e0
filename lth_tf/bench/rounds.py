"""Contenders that alternate in rounds, and what several measurements begin with."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

from lth_tf.errors import UserError
from lth_tf.masks import Scores
from lth_tf.scorers import SCORERS
from lth_tf.spec import Spec
from lth_tf.training import Trainer, Weights, initial_weights
from lth_tf.training.feeds import CHUNK

Contender = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


def alternate(contenders: dict[Name, Contender], rounds: int) -> dict[Name, list[float]]:
    """Returns the seconds of each contender in each round; one unmeasured call comes first.

    In a round each runs once, so that whatever else the machine does hits all alike.
    """
    for run in contenders.values():
        run()
    seconds: dict[Name, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Returns the median over rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def alone(spec: Spec) -> Spec:
    """Returns the spec on one replica; raises UserError where it asks for others."""
    if spec.distribute not in ("auto", "none") or spec.devices:
        raise UserError(
            "this compares what one replica does; leave --distribute and --devices out, or use "
            "lth-bench scale"
        )
    return dataclasses.replace(spec, distribute="none")


def initial(trainer: Trainer) -> tuple[Weights, Scores]:
    """Returns the initial weights of a trainer's network, and their magnitudes."""
    spec = trainer.spec
    weights, kernels = initial_weights(spec, trainer.input_shape, trainer.classes, spec.seed)
    return weights, SCORERS["magnitude"](None, {name: weights[name] for name in kernels})


def advancing(trainer: Trainer, steps: int) -> Contender:
    """Returns what does so many steps, in blocks as a training does."""
    block = min(CHUNK, trainer.spec.eval_every)

    def run() -> None:
        for step in range(0, steps, block):
            trainer.advance(step, min(step + block, steps), trainer.spec.seed)

    return run


def rate_text(rate: float) -> str:
    """Returns a rate as tables show it.

    >>> rate_text(1234.5), rate_text(7.25)
    ('1,234', '7.2')
    """
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
