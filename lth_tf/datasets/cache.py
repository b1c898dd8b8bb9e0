"""Decoded arrays on disk: one uncompressed .npz a data set, whose CRC-32s tell damage.

Files lie in $LTH_TF_CACHE, else $XDG_CACHE_HOME/lth_tf, else ~/.cache/lth_tf. The whole
folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Iterable, Mapping

import numpy as np

from lth_tf import edge
from lth_tf.errors import UserError


def folder() -> pathlib.Path:
    """Returns where the cache is; the folder need not exist.

    Raises:
      UserError: it would lie in a home folder, and there is none.
    """
    if given := os.environ.get("LTH_TF_CACHE"):
        return edge.folder(given)
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if base.startswith("~") and os.path.expanduser(base) == base:
        raise UserError(
            "there is no home folder that the cache of decoded data could lie in; set HOME, or "
            "LTH_TF_CACHE to a folder"
        )
    return edge.folder(base) / "lth_tf"


def read(path: pathlib.Path, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """Returns the named arrays of the file, or None if it is absent, unreadable or damaged."""
    try:
        with np.load(path) as stored:
            return {name: stored[name] for name in names}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays beside `path` and renames; a folder that cannot be written is no error."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                np.savez(file, **dict(arrays))  # type: ignore[arg-type]
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
