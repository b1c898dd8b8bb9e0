"""Spec <-> absl flags, presets, and how the command-line tools start and fail."""

from __future__ import annotations

import dataclasses
import importlib.resources
import os
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

from lth_tf.branches import BRANCHES
from lth_tf.datasets import DATASETS
from lth_tf.errors import UserError
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


def define_spec(*recipes: str, **defaults: Any) -> None:
    """Defines a flag for every field of Spec that the recipes have, and --preset.

    Args:
      *recipes: 'imp', 'one_shot', both, or nothing for the fields that all have.
      **defaults: field -> default, where it is not Spec's.
    """
    for field in _fields(*recipes):
        if field.name in flags.FLAGS:
            continue
        default = defaults.get(field.name, field.default)
        text = field.metadata["help"]
        if registry := field.metadata.get("registry"):
            entry = REGISTRIES[registry]
            text += f" One of: {', '.join([*entry, *entry._families])}."
        if choices := field.metadata.get("choices"):
            text += f" One of: {', '.join(choices)}."
        if field.type == "bool":
            flags.DEFINE_bool(field.name, default, text)
        else:
            flags.DEFINE(
                _Parser(field),
                field.name,
                default,
                ("comma-separated: " if "tuple" in str(field.type) else "") + text,
                serializer=_Serializer(),
            )
    if "one_shot" in recipes and "compression" not in flags.FLAGS:
        flags.DEFINE_list(
            "compression", None, "comma-separated: 1 / density; takes the place of --density."
        )
    if "preset" not in flags.FLAGS:
        flags.DEFINE_string(
            "preset",
            None,
            "Flags from a file that ships with lth_tf; stands for them where it is written, so "
            f"that later flags win. One of: {', '.join(presets())}.",
        )


def _fields(*recipes: str) -> list[dataclasses.Field]:
    return [
        field
        for field in dataclasses.fields(Spec)
        if field.metadata.get("flag", True)
        and ("recipe" not in field.metadata or field.metadata["recipe"] in recipes)
    ]


def spec_from_flags(recipe: str = "imp") -> Spec:
    """Returns the Spec that the command line describes; raises UserError as Spec does."""
    if flags.FLAGS.preset:  # those on the command line were replaced by `expand`
        raise UserError(
            f"--preset={flags.FLAGS.preset} inside a flag file is not expanded; write "
            f"--flagfile={presets().get(flags.FLAGS.preset, 'PATH')} there"
        )
    values = flags.FLAGS.flag_values_dict()
    given = {field.name: values[field.name] for field in _fields(recipe)}
    if recipe == "one_shot" and flags.FLAGS.compression is not None:
        given["density"] = tuple(_density(text) for text in flags.FLAGS.compression)
    return Spec(recipe=recipe, **given)


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
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what is finished is kept, run the same command again to go on",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)
