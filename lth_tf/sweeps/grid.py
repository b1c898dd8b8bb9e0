"""What a sweep is: the runs of a grid, parsed, and the trunks that they share."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lth_tf import flags
from lth_tf.errors import UserError
from lth_tf.experiments import trunk
from lth_tf.recipes import RECIPES
from lth_tf.spec import Spec

_ABSENT: tuple[None, ...] = (None,)  # an axis that is not given


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment of a grid.

    Attributes:
      folder: below the sweep's workdir: 'runs/NAME', or 'trunks/DIGEST' for a trunk.
      words: the flags that say what it is.
      spec: the same, parsed.
      preset: name of its preset or flag file, or ''.
      trunk: folder of the trunk that it takes its dense training from, or None.
    """

    folder: str
    words: tuple[str, ...]
    spec: Spec
    preset: str = ""
    trunk: str | None = None

    @property
    def name(self) -> str:
        """The folder without 'runs/'."""
        return self.folder.removeprefix("runs/")

    @property
    def tool(self) -> str:
        """The console command that does it."""
        return RECIPES[self.spec.recipe].tool


@dataclasses.dataclass(frozen=True)
class Grid:
    """The runs of a sweep, and the trunks that two or more of them share, by folder."""

    runs: list[Run]
    trunks: dict[str, Run]

    @property
    def saved(self) -> int:
        """How many dense trainings need not be done, replicates counted."""
        shared = sum(run.spec.replicates for run in self.runs if run.trunk)
        return shared - sum(each.spec.replicates for each in self.trunks.values())


def grid(
    presets: Sequence[str] | None,
    seeds: Sequence[str] | None,
    densities: Sequence[str] | None,
    scorers: Sequence[str] | None,
    passed: Sequence[str] = (),
    vary: Sequence[str] = (),
) -> Grid:
    """Returns all combinations, each parsed; an axis that is None is left to the other flags.

    A run's name has its value on each axis that is given, even if it is the only one, so
    that it stays the same when the grid grows.

    Args:
      presets: names of presets, or paths of flag files.
      seeds, densities, scorers: values, as on a command line. A density is the only
        ticket's for lth-oneshot, the last level's for lth-imp.
      passed: flags of lth-imp, lth-oneshot or lth-sparse for every run.
      vary: further axes, 'FLAG=VALUE,VALUE' each.

    Raises:
      UserError: an axis without values, with one twice, or that `passed` has, too; scorers
        for lth-imp; a run that cannot be parsed (says which), or two that are the same.
    """
    axes = {"presets": presets, "scorers": scorers, "densities": densities, "seeds": seeds}
    varied = _varied(vary)
    for axis, values in axes.items():
        if values is not None and (not values or len(set(values)) < len(values)):
            raise UserError(f"--{axis}={','.join(values)} must name different values")
    given = {word.lstrip("-").partition("=")[0] for word in passed}
    runs: list[Run] = []
    for preset, scorer, *others, density, seed in itertools.product(
        presets or _ABSENT, scorers or _ABSENT, *varied.values(), densities or _ABSENT,
        seeds or _ABSENT,
    ):  # fmt: skip
        stem = Path(preset).name.removesuffix(".flags") if preset else ""
        more = {name: str(value) for name, value in zip(varied, others, strict=True)}
        parts = (
            stem, scorer, *(f"{name}{value}" for name, value in more.items()),
            density and f"density{density}", seed and f"seed{seed}",
        )  # fmt: skip
        name = "-".join(filter(None, parts)) or "run"
        base = (*_preset_words(preset), *passed)
        try:
            able = [r for r in RECIPES if not scorer or "scorer" in RECIPES[r].fields]
            added = tuple(f"--{name}={value}" for name, value in more.items())
            recipe = flags.recipe_of((*base, *added)) or able[0]
            if recipe not in able:
                tools = " or ".join(RECIPES[r].tool for r in able)
                raise UserError(
                    f"--scorers are for {tools}, and its other flags for {RECIPES[recipe].tool}"
                )
            point = {"scorer": scorer, RECIPES[recipe].target: density, "seed": seed}
            own = {field: value for field, value in point.items() if value}
            if twice := given & {*own, *more, "compression" if density else ""}:
                raise UserError(f"--{min(twice)} is given after --, but is an axis of the grid")
            if twice := own.keys() & more.keys():
                raise UserError(f"--vary={min(twice)}=... is an axis of the grid already")
            own = {**own, **more}
            words = (*base, *(f"--{field}={value}" for field, value in own.items()))
            spec = flags.parse(words, recipe)
            if density and list(RECIPES[recipe].asked(spec)) != [float(density)]:
                raise UserError("its flag file has --compression, which overrules --densities")
        except UserError as error:
            raise UserError(f"run {name!r}: {error}") from error
        for other in runs:
            if other.spec == spec or other.folder == f"runs/{name}":
                raise UserError(f"the runs {other.name!r} and {name!r} are the same; give one")
        runs.append(Run(f"runs/{name}", words, spec, stem))
    return _with_trunks(runs)


def _varied(vary: Sequence[str]) -> dict[str, list[str]]:
    """The values of each flag that is varied."""
    found: dict[str, list[str]] = {}
    for text in vary:
        name, equals, listed = text.lstrip("-").partition("=")
        values = [value.strip() for value in listed.split(",") if value.strip()]
        one_each = len(set(values)) == len(values) and name not in found
        if not (name and equals and values and one_each) or os.sep in listed:
            raise UserError(
                f"--vary={text} is not FLAG=VALUE,VALUE with different values of one flag, e.g. "
                "--vary=update_every=50,100"
            )
        found[name] = values
    return found


def _preset_words(preset: str | None) -> tuple[str, ...]:
    if preset is None:
        return ()
    is_path = os.sep in preset or preset.endswith(".flags")
    return (f"--flagfile={preset}" if is_path else f"--preset={preset}",)


def _with_trunks(runs: Sequence[Run]) -> Grid:
    """Gives the runs that share their dense training its trunk."""
    groups: dict[tuple, list[Spec]] = {}
    for run in runs:
        if RECIPES[run.spec.recipe].has_dense(run.spec):
            groups.setdefault(_dense(run.spec), []).append(run.spec)
    trunks = {}
    for dense, members in groups.items():
        spec = dataclasses.replace(
            trunk.spec(members[0]),
            replicates=max(m.replicates for m in members),
            histograms=any(m.histograms for m in members),
        )
        if len(members) > 1 and _dense(spec) == dense:
            trunks[dense] = Run(f"trunks/{spec.digest()}", words_of(spec), spec)
    of = {
        run.name: trunks.get(_dense(run.spec))
        for run in runs
        if RECIPES[run.spec.recipe].has_dense(run.spec)
    }
    return Grid(
        [dataclasses.replace(r, trunk=t.folder) if (t := of.get(r.name)) else r for r in runs],
        {each.folder: each for each in trunks.values()},
    )


def _dense(spec: Spec) -> tuple:
    return tuple(sorted(trunk.trunk_fields(spec).items()))


def words_of(spec: Spec) -> tuple[str, ...]:
    """Returns the flags that describe a spec: those of its fields that are not default."""
    words, usual = [], RECIPES[spec.recipe].defaults
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if value == usual.get(field.name, field.default) or not field.metadata.get("flag", True):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no'}{field.name}")
        else:
            listed = value if isinstance(value, tuple) else (value,)
            words.append(f"--{field.name}={','.join(map(str, listed))}")
    return tuple(words)


def shard_of(text: str | None, environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Returns which part of a grid is this process's: (i, n), i from 1 to n.

    Args:
      text: 'i/n', or None: the position of a Slurm array task in its array, else (1, 1).
      environ: the environment variables.

    Raises:
      UserError: not of that form, out of range, or an array with gaps.

    >>> shard_of("2/3", {})
    (2, 3)
    """
    if text is not None:
        i, slash, n = text.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
            raise UserError(f"shard {text!r} is not i/n with i from 1 to n, e.g. --shard=1/4")
        return int(i), int(n)
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]
    if not all(environ.get(name, "").isdecimal() for name in names):
        return 1, 1
    task, first, last, count = (int(environ[name]) for name in names)
    step = (last - first) // (count - 1) if count > 1 else 1
    if first + step * (count - 1) != last or (task - first) % step:
        raise UserError(
            f"the Slurm array's {count} tasks from {first} to {last} are no evenly spaced range, "
            f"so that the position of task {task} is not known; give --shard=i/n"
        )
    return (task - first) // step + 1, count
