"""Spec <-> absl flags, presets, and how the command-line tools start and fail."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging

from lth_tf.datasets import DATASETS
from lth_tf.errors import UserError
from lth_tf.experiments.branches import BRANCHES
from lth_tf.models import INITS, MODELS
from lth_tf.pruning import InvariantError
from lth_tf.registry import Registry, nearest
from lth_tf.schedules import LR_SCHEDULES
from lth_tf.scopes import SCOPES
from lth_tf.scorers import LOSSES, SCORERS
from lth_tf.spec import Spec
from lth_tf.training import OPTIMIZERS

REGISTRIES: dict[str, Registry] = {
    "branches": BRANCHES,
    "datasets": DATASETS,
    "inits": INITS,
    "losses": LOSSES,
    "lr_schedules": LR_SCHEDULES,
    "models": MODELS,
    "optimizers": OPTIMIZERS,
    "scopes": SCOPES,
    "scorers": SCORERS,
}
DEFAULTS: dict[str, dict[str, Any]] = {"imp": {}, "one_shot": {"scope": "global"}}


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
      *recipes: 'imp', 'one_shot', both, or nothing for the fields that all have.
      values: where they are defined (default: where absl's main looks).
      **defaults: field -> default, where it is not Spec's.
    """
    for field in _fields(*recipes):
        if field.name in values:
            continue
        default = defaults.get(field.name, field.default)
        text = field.metadata["help"]
        if registry := field.metadata.get("registry"):
            entry = REGISTRIES[registry]
            text += f" One of: {', '.join([*entry, *entry._families])}."
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
    if "one_shot" in recipes and "compression" not in values:
        flags.DEFINE_list(
            "compression", None, "comma-separated: 1 / density; takes the place of --density.",
            flag_values=values,
        )  # fmt: skip
    if "preset" not in values:
        flags.DEFINE_string(
            "preset",
            None,
            "Flags from a file that ships with lth_tf; stands for them where it is written, so "
            f"that later flags win. One of: {', '.join(presets())}.",
            flag_values=values,
        )


def _fields(*recipes: str) -> list[dataclasses.Field]:
    return [
        field
        for field in dataclasses.fields(Spec)
        if field.metadata.get("flag", True)
        and ("recipe" not in field.metadata or field.metadata["recipe"] in recipes)
    ]


def spec_from_flags(recipe: str = "imp", values: flags.FlagValues = flags.FLAGS) -> Spec:
    """Returns the Spec that the command line describes; raises UserError as Spec does."""
    if values.preset:  # those on the command line were replaced by `expand`
        raise UserError(
            f"--preset={values.preset} inside a flag file is not expanded; write "
            f"--flagfile={presets().get(values.preset, 'PATH')} there"
        )
    given = {field.name: values[field.name].value for field in _fields(recipe)}
    if recipe == "one_shot" and values.compression is not None:
        given["density"] = tuple(_density(text) for text in values.compression)
    return Spec(recipe=recipe, **given)


def recipe_of(words: Sequence[str]) -> str | None:
    """Returns the recipe whose own flags are among `words`; None where both could be meant.

    Raises:
      UserError: an unknown flag, a wrong value, or flags of both recipes.
    """
    given = _parsed(words, "imp", "one_shot")
    only = {f.name: f.metadata.get("recipe") for f in _fields("imp", "one_shot")}
    only["compression"] = "one_shot"
    own = {name: recipe for name, recipe in only.items() if recipe and given[name].present}
    if len(set(own.values())) > 1:
        listed = ", ".join(f"--{name} ({recipe})" for name, recipe in own.items())
        raise UserError(f"flags of both recipes: {listed}; give those of one")
    return next(iter(own.values()), None)


def parse(words: Sequence[str], recipe: str) -> Spec:
    """Returns the Spec that these flags of lth-imp ('imp') or lth-oneshot ('one_shot') describe.

    Presets and flag files are read; absl's own FLAGS stay as they are.

    Raises:
      UserError: an unknown flag, a wrong value, or as Spec does.
    """
    return spec_from_flags(recipe, _parsed(words, recipe, **DEFAULTS[recipe]))


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
            if not os.path.isfile(value):
                raise UserError(f"there is no flag file {value!r}")
            word = f"--flagfile={value}"
        out.append(word)
    return out


def run(main: Callable[..., Any], commands: tuple[str, ...] = ()) -> None:
    """Runs a tool: parses flags, calls main, and ends with one sentence where a user erred.

    Args:
      main: called with nothing, or with the command where there are any; returns the
        exit code or None.
      commands: words of which the first one that is not a flag must be.
    """

    def guarded(argv: list[str]) -> int:
        words = argv[1:]
        if commands and (not words or words[0] not in commands):
            given = f"unknown command {words[0]!r}" if words else "no command given"
            raise UserError(f"{given}; there are: {', '.join(commands)}")
        if len(words) > bool(commands):
            raise UserError(f"unexpected {words[-1]!r}: everything is a flag (--name=value)")
        return main(*words) or 0

    logging.set_verbosity(logging.WARNING)
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("lth_tf") or module == sys.argv[0]:
            for flag in defined:  # --help shows those of argv[0] only
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        app.run(guarded, argv=expand(sys.argv))
    except (UserError, InvariantError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "code", 1))
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run the same command again to go on",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)
