"""Decoded arrays on disk: one uncompressed .npz a data set, with a checksum over all.

Files lie in $LTH_TF_CACHE, else $XDG_CACHE_HOME/lth_tf, else ~/.cache/lth_tf. The whole
folder can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Mapping

import numpy as np

from lth_tf import edge, storage
from lth_tf.errors import UserError

# The CRC-32s of the archive are those of its members, not of their names.
_CHECKSUM = "sha256"


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
            found = {name: stored[name] for name in names}
            checksum = str(stored[_CHECKSUM])
    except Exception:  # a damaged archive raises anything; and a cache is not needed
        return None
    return found if checksum == storage.digest(found) else None


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes the arrays beside `path` and renames; a folder that cannot be written is no error."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            checksum = np.array(storage.digest(arrays))
            with open(beside, "wb") as file:
                np.savez(file, **{**arrays, _CHECKSUM: checksum})  # type: ignore[arg-type]
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def key(*about: bytes, files: Iterable[pathlib.Path]) -> str:
    """Returns what the name of a file here ends with: other for every other source.

    Args:
      *about: what the arrays depend on besides the files.
      files: what they are decoded from, by their names, sizes and times.
    """
    found = hashlib.sha256(b"\0".join(about))
    for path in files:
        stat = path.stat()
        found.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()[:16]
