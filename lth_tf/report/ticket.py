"""What a ticket's file holds, and what several have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import rich.box
from rich.table import Table

from lth_tf import masks
from lth_tf.analysis.overlap import Overlap
from lth_tf.masks import Mask
from lth_tf.recipes import RECIPES
from lth_tf.tickets import Ticket


def ticket_table(ticket: Ticket, through: Mask | None, title: str) -> Table:
    """Returns a row for each kernel: weights, and how many of them are kept.

    Args:
      ticket: it.
      through: the part of its mask that lies on paths, see `analysis.connected`; None: not known.
      title: what stands above.
    """
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("kernel")
    for column in ("shape", "weights", "kept", "density", "in effect"):
        table.add_column(column, justify="right")
    for name, m in ticket.mask.items():
        shape = " x ".join(map(str, m.shape))
        table.add_row(name, shape, *_counts({name: m}, through and {name: through[name]}))
    table.add_section()
    table.add_row("all", "", *_counts(ticket.mask, through))
    return table


def _counts(mask: Mask, through: Mask | None) -> list[str]:
    shown = f"{masks.density(through):.4%}" if through else ""
    return [f"{masks.size(mask):,}", f"{masks.kept(mask):,}", f"{masks.density(mask):.4%}", shown]


def provenance(ticket: Ticket) -> Iterator[str]:
    """Yields where a ticket comes from, in sentences."""
    spec, origin = ticket.spec, ticket.origin
    recipe, whose = RECIPES[spec.recipe], f"replicate {origin.get('replicate')}"
    yield (
        f"{spec.model} on {spec.dataset}, by {recipe.method(spec)} ({recipe.tool}): level "
        f"{ticket.level}, {whose}, {origin.get('arm')}, seed {origin.get('seed')}; training starts "
        f"at step {ticket.rewind_step:,}"
    )
    initial = str(origin.get("initial_sha256"))[:16]
    yield f"initial weights sha256 {initial}, ticket {ticket.digest[:16]}"


def overlap_table(found: Mapping[str, Overlap], title: str) -> Table:
    """Returns a row for each kernel: how much two masks have in common, beside two kinds of chance.

    Args:
      found: see `analysis.overlap.overlaps`.
      title: what stands above.
    """
    table = Table(title=title, box=rich.box.SIMPLE_HEAD)
    table.add_column("kernel")
    columns = ("first", "second", "both", "R_p", "Jaccard", "by density", "by units")
    for column in columns:
        table.add_column(column, justify="right")
    for name, one in found.items():
        if not name:
            table.add_section()
        numbers: list[Any] = [one.first, one.second, one.both]
        shares = one.share, one.jaccard(), one.jaccard(one.densities), one.jaccard(one.units)
        table.add_row(
            name or "all", *(f"{n:,}" for n in numbers), *(f"{share:.3f}" for share in shares)
        )
    return table


def verdict_of(found: Overlap) -> str:
    """Says how much two masks have in common beyond chance: the effect first."""
    times, plain = (
        found.both / chance if chance else float("inf")
        for chance in (found.units, found.densities)
    )
    more = "more than" if times > 1.05 else "less than" if times < 0.95 else "what"
    return (
        f"both keep {found.both:,} weights: {times:.2f} times what masks with the same in- and "
        f"out-counts of units have in common by chance ({found.units:,.0f}), {plain:.2f} times "
        f"what masks of the same densities have ({found.densities:,.0f}): {more} chance gives"
    )
