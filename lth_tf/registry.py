"""A dictionary of named choices whose miss is an answer."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from lth_tf.errors import UserError

T = TypeVar("T")


def nearest(name: str, names: list[str]) -> str:
    """Returns ' Did you mean ...?' for a likely typo, else ''."""
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class Registry(Mapping[str, T], Generic[T]):
    """Maps names to entries; built by decoration, read like a dict.

    Args:
      kind: what an entry is called in error messages, e.g. 'scope'.
      resolve: for families of names ('lenet_300_100'): called with a name that
        has no entry of its own, returns an entry or None.
      families: how such names look, for error messages: ('lenet_A_B',).
      **facts: what others need to know of an entry without a list of names: fact ->
        its value where the entry says nothing.

    >>> COLOURS = Registry("colour", warm=False)
    >>> @COLOURS.register("red", warm=True)
    ... def red(): return "#f00"
    >>> COLOURS["red"](), COLOURS.about("red").warm
    ('#f00', True)
    >>> COLOURS["rad"]
    Traceback (most recent call last):
    ...
    lth_tf.errors.UserError: unknown colour 'rad'; there are: red. Did you mean 'red'?
    """

    def __init__(
        self,
        kind: str,
        resolve: Callable[[str], T | None] | None = None,
        families: tuple[str, ...] = (),
        **facts: Any,
    ):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._resolve = resolve
        self._families = families
        self._facts = facts
        self._said: dict[str, dict[str, Any]] = {}

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Decorator that enters a function under `name`, with what is to be known of it."""
        if strange := set(facts) - set(self._facts):
            raise TypeError(f"a {self.kind} has no {', '.join(strange)}, only {[*self._facts]}")

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            self._said[name] = facts
            return entry

        return enter

    def remove(self, name: str) -> None:
        """Takes an entry out again."""
        del self._entries[name], self._said[name]

    def about(self, name: str) -> types.SimpleNamespace:
        """Returns the facts of an entry as attributes; raises UserError where there is none."""
        self[name]
        return types.SimpleNamespace(**{**self._facts, **self._said.get(name, {})})

    @property
    def choices(self) -> list[str]:
        """The names, and how those of families look."""
        return [*self._entries, *self._families]

    def __getitem__(self, name: str) -> T:
        """Returns the entry; raises UserError naming what exists and the nearest."""
        known_type = isinstance(name, str)
        if known_type and name in self._entries:
            return self._entries[name]
        entry = self._resolve(name) if self._resolve and known_type else None
        if entry is None:
            known = self.choices
            raise UserError(
                f"unknown {self.kind} {name!r}; there are: {', '.join(known)}."
                f"{nearest(str(name), known)}"
            )
        return entry

    def __contains__(self, name: object) -> bool:
        try:
            self[str(name)]
        except UserError:
            return False
        return True

    def get(self, name: str, default: Any = None) -> Any:
        """Returns the entry, or `default` where there is none."""
        return self[name] if name in self else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
