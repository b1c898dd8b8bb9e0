"""Spec <-> absl flags, presets, and how the command-line tools start and fail.

Longer than other files, for it is the only one that knows absl's flags.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from lth_tf import edge
from lth_tf.datasets import DATASETS
from lth_tf.dynamic import FRACTIONS, METHODS
from lth_tf.errors import UserError
from lth_tf.execution import COMPACT, ENGINES
from lth_tf.experiments.branches import BRANCHES
from lth_tf.models import INITS, MODELS
from lth_tf.recipes import RECIPES
from lth_tf.registry import Registry, nearest
from lth_tf.schedules import LR_SCHEDULES
from lth_tf.scopes import SCOPES
from lth_tf.scorers import LOSSES, SCORERS, field_of, options_of
from lth_tf.spec import Spec, fields_of, owners
from lth_tf.training import OPTIMIZERS

REGISTRIES: dict[str, Registry] = {
    "branches": BRANCHES,
    "datasets": DATASETS,
    "fractions": FRACTIONS,
    "inits": INITS,
    "losses": LOSSES,
    "lr_schedules": LR_SCHEDULES,
    "methods": METHODS,
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "recipes": RECIPES,
    "scopes": SCOPES,
    "scorers": SCORERS,
}


class _Parser(flags.ArgumentParser):
    """Parses one field of Spec; a wrong choice names what exists and the nearest."""

    def __init__(self, field: dataclasses.Field):
        self.kind = str(field.type).removesuffix(" | None")
        self.field = field
        self.syntactic_help = ""

    def parse(self, argument: Any) -> Any:
        if argument is None or not isinstance(argument, str):
            return argument
        if self.kind.startswith("tuple"):
            parts = [part.strip() for part in argument.split(",") if part.strip()]
            return tuple(self._one(part) for part in parts)
        return self._one(argument)

    def _one(self, text: str) -> Any:
        if "int" in self.kind:
            try:
                return int(text.replace("_", ""))
            except ValueError:
                raise ValueError(f"{text!r} is not a whole number") from None
        if "float" in self.kind:
            try:
                return float(text)
            except ValueError:
                raise ValueError(f"{text!r} is not a number") from None
        if registry := self.field.metadata.get("registry"):
            REGISTRIES[registry][text]
        choices = self.field.metadata.get("choices", (text,))
        if text not in choices:
            raise ValueError(
                f"unknown {self.field.name} {text!r}; there are: {', '.join(choices)}."
                f"{nearest(text, list(choices))}"
            )
        return text

    def flag_type(self) -> str:
        return self.kind


class _Serializer(flags.ArgumentSerializer):
    def serialize(self, value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def define_spec(*recipes: str, values: flags.FlagValues = flags.FLAGS, **defaults: Any) -> None:
    """Defines a flag for every field of Spec that the recipes have, and --preset.

    Args:
      *recipes: keys of RECIPES; none for the fields that all have.
      values: where they are defined (default: where absl's main looks).
      **defaults: field -> default, where it is not Spec's.
    """
    known = _fields(*recipes)
    for field in known:
        if field.name in values:
            continue
        default = defaults.get(field.name, field.default)
        text = field.metadata["help"]
        if registry := field.metadata.get("registry"):
            text += f" One of: {', '.join(REGISTRIES[registry].choices)}."
        if choices := field.metadata.get("choices"):
            text += f" One of: {', '.join(choices)}."
        if field.type == "bool":
            flags.DEFINE_bool(field.name, default, text, flag_values=values)
        else:
            flags.DEFINE(
                _Parser(field),
                field.name,
                default,
                ("comma-separated: " if "tuple" in str(field.type) else "") + text,
                serializer=_Serializer(),
                flag_values=values,
            )
    if any(field.name == "density" for field in known) and "compression" not in values:
        flags.DEFINE_list(
            "compression", None, "comma-separated: 1 / density; takes the place of --density.",
            flag_values=values,
        )  # fmt: skip
    if any(field.name == "scorer" for field in known):
        for name, (scorer, option) in scorer_flags().items():
            if name not in values:
                _define_option(name, scorer, option, values)
    if "preset" not in values:
        flags.DEFINE_string(
            "preset",
            None,
            "Flags from a file that ships with lth_tf; stands for them where it is written, so "
            f"that later flags win. One of: {', '.join(presets())}.",
            flag_values=values,
        )


def define_execution(jobs: str) -> list[flags.FlagHolder]:
    """Defines the flags that say how trainings are computed, which is no part of a Spec.

    Args:
      jobs: what the flag is called that says how many are trained side by side.

    Returns:
      What have the values of that, of --engine, of --compact_training and of --threads.
    """
    what = "; ".join(f"{name}: {text}" for name, text in ENGINES.items())
    engine = flags.DEFINE_enum(
        "engine", None, list(ENGINES),
        f"What computes the steps of trainings. {what}. (default: what the workdir was begun with, "
        "or tensorflow)",
    )  # fmt: skip
    saves = "; ".join(f"{name}: {text}" for name, text in COMPACT.items())
    compact = flags.DEFINE_enum(
        "compact_training", None, list(COMPACT),
        "Whether TensorFlow trains only the channels that take part in a training under its mask, "
        f"as a smaller network. {saves}. (default: what the workdir was begun with, or auto)",
    )  # fmt: skip
    threads = flags.DEFINE_integer(
        "threads", None,
        "Threads for each operation of a training. Equal ones give equal bits, however many are "
        "trained side by side. (default: what the workdir was begun with; or all cores, shared)",
        lower_bound=1,
    )  # fmt: skip
    side = flags.DEFINE_string(
        jobs, "1",
        "Trainings side by side in one experiment, each in a process of its own that has its share "
        "of cores and GPUs: a number, or auto.",
    )  # fmt: skip
    return [side, engine, compact, threads]


def scorer_flags() -> dict[str, tuple[str, str]]:
    """Returns flag -> (scorer, option), for the options that no field of Spec has."""
    return {
        f"{scorer}_{option}": (scorer, option)
        for scorer in SCORERS
        for option in options_of(scorer)
        if option != "seed" and field_of(scorer, option) is None
    }


def _define_option(name: str, scorer: str, option: str, values: flags.FlagValues) -> None:
    """Defines the flag of a scorer's option: type and choices of its annotation, help of its Args.

    Not given it is None, so that the scorer's own default holds.
    """
    parameter = options_of(scorer)[option]
    found = re.search(
        rf"^ +{option}: (.*?)(?=\n *\n|\n +\w+: |\Z)", SCORERS[scorer].__doc__ or "", re.S | re.M
    )
    text = " ".join(found[1].split()) if found else f"Option {option!r}."
    text = f"For --scorer={scorer}: {text} (default: {parameter.default})"
    kinds = [parameter.annotation, *typing.get_args(parameter.annotation), type(parameter.default)]
    if typing.get_origin(parameter.annotation) is typing.Literal:
        choices = list(typing.get_args(parameter.annotation))
        flags.DEFINE_enum(name, None, choices, text, flag_values=values)
    elif bool in kinds:
        flags.DEFINE_bool(name, None, text, flag_values=values)
    elif float in kinds:
        flags.DEFINE_float(name, None, text, flag_values=values)
    elif int in kinds:
        flags.DEFINE_integer(name, None, text, flag_values=values)
    else:
        flags.DEFINE_string(name, None, text, flag_values=values)


def _scorer_options(scorer: str, values: flags.FlagValues) -> tuple[tuple[str, Any], ...]:
    """The options that the flags give the scorer and that are not its defaults."""
    found = []
    for name, (owner, option) in scorer_flags().items():
        value = values[name].value
        if value is None:
            continue
        if owner != scorer:
            raise UserError(f"{name} {value!r} needs --scorer={owner}")
        if value != options_of(scorer)[option].default:
            found.append((option, value))
    return tuple(found)


def _fields(*recipes: str) -> list[dataclasses.Field]:
    shared = {name for name in fields_of() if not owners(name)}
    names = set(fields_of(*recipes)) if recipes else shared
    return [f for f in dataclasses.fields(Spec) if f.name in names and f.metadata.get("flag", True)]


def spec_from_flags(recipe: str = "imp", values: flags.FlagValues = flags.FLAGS) -> Spec:
    """Returns the Spec that the command line describes; raises UserError as Spec does."""
    if values.preset:  # those on the command line were replaced by `expand`
        raise UserError(
            f"--preset={values.preset} inside a flag file is not expanded; write "
            f"--flagfile={presets().get(values.preset, 'PATH')} there"
        )
    given: dict[str, Any] = {field.name: values[field.name].value for field in _fields(recipe)}
    if "density" in given and values.compression is not None:
        given["density"] = tuple(_density(text) for text in values.compression)
    if "scorer" in given:
        given["scorer_options"] = _scorer_options(given["scorer"], values)
    spec = Spec(recipe=recipe, **given)
    spec.require_effect()
    return spec


def recipe_of(words: Sequence[str]) -> str | None:
    """Returns the first recipe that has all flags among `words`; None where all recipes have them.

    Raises:
      UserError: an unknown flag, a wrong value, or flags of which no recipe has all.
    """
    given = _parsed(words, *RECIPES)
    alike = {"compression": "density", **dict.fromkeys(scorer_flags(), "scorer")}
    names = [field.name for field in _fields(*RECIPES)]
    whose = {name: owners(alike.get(name, name)) for name in [*names, *alike]}
    own = {name: has for name, has in whose.items() if has and given[name].present}
    left = [recipe for recipe in RECIPES if all(recipe in has for has in own.values())]
    if not left:
        listed = ", ".join(f"--{name} ({', '.join(has)})" for name, has in own.items())
        which = "both" if len(set(itertools.chain(*own.values()))) == 2 else "several"
        raise UserError(f"flags of {which} recipes: {listed}; give those of one")
    return left[0] if own else None


def parse(words: Sequence[str], recipe: str) -> Spec:
    """Returns the Spec that these flags of a recipe's command describe.

    Presets and flag files are read; absl's own FLAGS stay as they are.

    Raises:
      UserError: an unknown flag, a wrong value, or as Spec does.
    """
    return spec_from_flags(recipe, _parsed(words, recipe, **RECIPES[recipe].defaults))


def _parsed(words: Sequence[str], *recipes: str, **defaults: Any) -> flags.FlagValues:
    values = flags.FlagValues()
    define_spec(*recipes, values=values, **defaults)
    try:
        rest = values(expand(["lth", *words]))
    except flags.Error as error:
        raise UserError(str(error)) from error
    if rest[1:]:
        raise UserError(f"unexpected {rest[1]!r}: everything is a flag (--name=value)")
    return values


def _density(compression: str) -> float:
    try:
        factor = float(compression)
    except ValueError:
        factor = 0.0
    if not 1 < factor < float("inf"):
        raise UserError(
            f"compression {compression!r} is out of range; it is the number of weights divided by "
            "the number kept, above 1"
        )
    return 1 / factor


def presets() -> dict[str, str]:
    """Returns preset name -> path of its flag file."""
    folder = importlib.resources.files("lth_tf.presets")
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".flags")]
    return {e.name.removesuffix(".flags"): str(e) for e in sorted(found, key=lambda e: e.name)}


def expand(argv: list[str]) -> list[str]:
    """Returns argv with each --preset=NAME replaced by --flagfile=PATH.

    Raises:
      UserError: an unknown preset; or a flag file that is not there.
    """
    out: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--preset", "-preset", "--flagfile", "-flagfile"):
            value = value if equals else next(words, "")
            if name.endswith("preset"):
                known = presets()
                if value not in known:
                    raise UserError(
                        f"unknown preset {value!r}; there are: {', '.join(known)}."
                        f"{nearest(value, list(known))}"
                    )
                value = known[value]
            _require_readable(value, ())
            word = f"--flagfile={value}"
        out.append(word)
    return out


def _require_readable(path: str, through: tuple[str, ...]) -> None:
    """Raises UserError unless a flag file, and those that it names, are text that absl can read.

    Args:
      path: the file.
      through: the files that named it, the first one first.
    """
    inside = f", which {through[-1]!r} names" if through else ""
    if "\0" in path or not os.path.isfile(path):
        raise UserError(f"there is no flag file {path!r}{inside}")
    if path in through:
        raise UserError(f"the flag file {path!r} names itself, by way of {through[-1]!r}")
    try:
        with open(path, encoding="utf-8") as file:  # as absl opens it
            lines = [line.strip() for line in file]
    except (OSError, ValueError) as error:
        raise UserError(f"the flag file {path!r}{inside} cannot be read ({error})") from error
    for line in lines:
        if found := re.match(r"--?flagfile(?:=\s*|\s+)(.*)", line):
            _require_readable(os.path.expanduser(found[1].strip()), (*through, path))


def run(
    main: Callable[..., Any], about: str, commands: tuple[str, ...] = (), files: bool = False
) -> None:
    """Runs a tool: parses flags, calls main, and ends with one sentence where a user erred.

    Args:
      main: called with nothing, or with the command where there are any; returns the
        exit code or None.
      about: what the tool is, for --help.
      commands: words of which the first one that is not a flag must be.
      files: whether others may follow, which main is called with, too.
    """

    def guarded(argv: list[str]) -> int:
        words = argv[1:]
        if commands and (not words or words[0] not in commands):
            given = f"unknown command {words[0]!r}" if words else "no command given"
            raise UserError(f"{given}; there are: {', '.join(commands)}")
        if len(words) > bool(commands) and not files:
            raise UserError(f"unexpected {words[-1]!r}: everything is a flag (--name=value)")
        edge.require_temporary()
        return main(*words) or 0

    logging.set_verbosity(logging.WARNING)
    with edge.outer():
        if {"--help", "-help", "--helpshort", "-helpshort", "-h", "-?"} & set(sys.argv[1:]):
            print(help_of(about, commands))
            sys.exit(0)
        app.run(guarded, argv=expand(sys.argv))


# Of each group those that are asked for most, first; whatever else there is follows these.
_GROUPS = {
    "experiment": ("preset", "seed", "replicates"),
    "data": ("dataset", "data_dir", "validation_size", "augmentation", "normalization"),
    "network": ("model", "width", "shortcut", "init"),
    "pruning": (
        "scorer", "density", "compression", "levels", "target_density", "prune_fraction",
        "rewind_step", "scope",
    ),
    "training": ("train_steps", "batch_size", "optimizer", "learning_rate", "lr_schedule"),
    "devices": (
        "distribute", "devices", "workers", "precision", "compile", "engine", "compact_training",
        "sync_batch_norm", "communication", "worker_timeout",
    ),
    "output": ("workdir", "plan"),
}  # fmt: skip


def _group(name: str) -> str:
    """The group of _GROUPS that a flag belongs to."""
    for group, names in _GROUPS.items():
        if name in names:
            return group
    if name in fields_of(role="masks") or name in scorer_flags():
        return "pruning"
    return "training" if name in fields_of(role="training") else "output"


def help_of(
    about: str, commands: Sequence[str] = (), values: flags.FlagValues = flags.FLAGS
) -> str:
    """Returns what --help prints: the flags of a tool by group, the main ones first.

    Args:
      about: what the tool is.
      commands: its commands, if any.
      values: where its flags are defined.
    """
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    names = [
        flag.name
        for module, defined in values.flags_by_module_dict().items()
        if module.startswith("lth_tf") or module == sys.argv[0]  # not those of what we import
        for flag in defined
    ]
    word = f" {{{','.join(commands)}}}" if commands else ""
    lines = [about, "", f"usage: {os.path.basename(sys.argv[0])}{word} --flag=value ..."]
    for group, first in _GROUPS.items():
        own = [n for n in first if n in names] + [
            n for n in names if n not in first and _group(n) == group
        ]
        lines += ["", f"{group}:"] if own else []
        for name in own:
            flag = values[name]
            default = (flag.default_as_str or "").strip("'")
            default = f" (default: {default})" if default not in ("", "false") else ""
            lines.append(f"  --{'[no]' * bool(flag.boolean)}{name}{default}")
            lines += textwrap.wrap(
                str(flag.help), width, initial_indent=6 * " ", subsequent_indent=6 * " "
            )
    return "\n".join([*lines, "", "--helpfull lists those of absl, too."])
