"""A verdict as a table and as sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import rich.box
from rich.table import Table

from lth_tf.tasks import task_of
from lth_tf.verdict.claims import NO, OPEN, YES, Claim
from lth_tf.verdict.judge import Verdict
from lth_tf.verdict.paired import Evidence

FEW = 500  # test examples below which no verdict is in bold


def verdict_table(found: Verdict, metric: str, examples: int | None = None) -> Table:
    """Returns a row for each density and component, with the answer of each conjunction.

    Args:
      found: the verdict.
      metric: of the task.
      examples: of the test part, where that is known.
    """
    task = task_of(metric)
    factor, _ = task.unit
    n = len(found.replicates)
    margin = f"{found.margin.value * factor:g}{' points' if task.percent else ''}"
    table = Table(
        title=f"{found.method}: {found.spec.model} on {found.spec.dataset}, {n} replicate(s), "
        f"margin {margin} ({found.margin.why})",
        box=rich.box.SIMPLE_HEAD,
    )
    for column in ("density", "claim", "difference", "interval", "p", "answer"):
        table.add_column(column, justify="left" if column in ("claim", "answer") else "right")
    bold = n > 1 and (examples is None or examples >= FEW)
    for early, end, beside in zip(found.early, found.end, found.beside, strict=True):
        table.add_section()
        shown = f"{early.density:.2%}"
        for claim, what in ((early, "winning at early stop"), (end, "winning at the end")):
            strong = bold and claim.answer != OPEN
            answer = f"[bold]{claim.answer}[/bold]" if strong else claim.answer
            table.add_row(shown, what, "", "", _p(claim.p_yes), answer)
            shown = ""
            for name, part in claim.parts.items():
                table.add_row("", f"  {name}", *_numbers(name, part, factor), _told(claim, name))
        for name, part in beside.items():
            table.add_row("", name, *_numbers(name, part, factor), part.why)
    return table


def _numbers(name: str, part: Evidence, factor: float) -> tuple[str, str, str]:
    """Difference, interval and p-value of a component."""
    if name in ("no later", "sooner") and part.estimate == part.estimate:
        low, high = (math.exp(v) if v == v else v for v in (part.low, part.high))
        interval = f"{low:.2f} to {high:.2f} times" if low == low else ""
        return f"{math.exp(part.estimate):.2f} times", interval, _p(part.p_yes)
    if part.estimate != part.estimate:
        return "", "", _p(part.p_yes)
    interval = f"{part.low * factor:+.2f} to {part.high * factor:+.2f}"
    shown = interval if part.low == part.low else ""
    return f"{part.estimate * factor:+.2f}", shown, _p(part.p_yes)


def _told(claim: Claim, name: str) -> str:
    part = claim.parts[name]
    return "; ".join(filter(None, ["refuted" if name in claim.refuted else "", part.why]))


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def verdict_sentences(found: Verdict, examples: int | None = None) -> Iterator[str]:
    """Yields what the verdict is in words, what would settle the rest, and what is missing.

    Args:
      found: the verdict.
      examples: see `verdict_table`.
    """
    for claims, where in ((found.early, "at early stop"), (found.end, "at the end of training")):
        said = [
            f"{_listed([c.density for c in claims if c.answer == answer])}: {answer}"
            for answer in (YES, NO, OPEN) if any(c.answer == answer for c in claims)
        ]  # fmt: skip
        yield f"Winning {where}, by density: {'; '.join(said)}."
    if found.down:
        span = f"from {found.down[0]:.2%} down to {found.down[-1]:.2%}"
        yield f"One after the other, tickets win at early stop {span}."
    n = len(found.replicates)
    for density, (about, most) in found.wanted.items():
        yield f"{density:.2%} is not resolved with {n} replicates; {_many(about, most)}."
    yield (
        "Intervals are over seeds, on this test set"
        + (f" of {examples:,} examples" if examples else "")
        + "; tests are one-sided and on pairs, and the densities share their level."
    )
    for text in found.missing:
        yield f"Missing: {text}."


def _many(about: int | None, most: int | None) -> str:
    if about is None:
        return "no number of replicates that is counted would settle it"
    if most is None:
        return f"{about} or more would do"
    return f"about {about} to {most} would do" if most > about else f"about {about} would do"


def _listed(densities: Sequence[float]) -> str:
    return ", ".join(f"{d:.2%}" for d in densities)


def verdict_dict(found: Verdict) -> dict[str, Any]:
    """Returns a verdict as it is written to verdict.json."""

    def plain(part: Evidence) -> dict[str, Any]:
        return {k: (None if v != v else v) for k, v in vars(part).items()}

    def told(claim: Claim) -> dict[str, Any]:
        return {
            "density": claim.density, "answer": claim.answer, "p": claim.p_yes,
            "level": claim.level, "refuted": list(claim.refuted),
            "parts": {name: plain(part) for name, part in claim.parts.items()},
        }  # fmt: skip

    return {
        "method": found.method, "margin": vars(found.margin),
        "replicates": list(found.replicates), "down_to": found.down,
        "early": [told(c) for c in found.early], "end": [told(c) for c in found.end],
        "beside": [{name: plain(part) for name, part in each.items()} for each in found.beside],
        "replicates_wanted": {f"{d:.6g}": list(w) for d, w in found.wanted.items()},
        "missing": found.missing,
    }  # fmt: skip
