"""Files that are either finished or absent, and a lock on the folder they lie in."""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from lth_tf.errors import UserError

METADATA_KEY = "lth_tf"
# The format of tickets, trained weights, checkpoints and spec.json; files of format 1 do not tell.
# 2: they tell; a checkpoint has masks. 3: trained weights and checkpoints tell whose they are.
FORMAT = 3
# What reading may raise where a file was damaged, or made by somebody else.
_DAMAGE = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
    MemoryError, csv.Error, safetensors.SafetensorError,
)  # fmt: skip


class NewerFormat(UserError):
    """A file that a later version of this package wrote."""


class OtherFile(UserError):
    """A whole file that is not the one that belongs where it is."""


@contextlib.contextmanager
def reading(path: os.PathLike | str, what: str, remedy: str) -> Iterator[None]:
    """Turns whatever reading a file raises into a UserError; within, ValueError says damage.

    Args:
      path: the file.
      what: what is said of it where it is damaged.
      remedy: what to do about it.

    Raises:
      UserError: there is no such file, or it cannot be read, or is damaged.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no file {os.fspath(path)!r}") from None
    except OSError as error:
        # Of a folder safetensors says "No such device".
        folder = os.path.isdir(path)
        why = "is a folder, not a file" if folder else f"cannot be read ({_short(error)})"
        raise UserError(f"{os.fspath(path)!r} {why}") from error
    except _DAMAGE as error:
        raise UserError(f"{os.fspath(path)!r} {what} ({_short(error)}); {remedy}") from error


def _short(error: BaseException) -> str:
    """What an error says, in one line that can be read."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def require(holds: Any, what: str) -> None:
    """Raises ValueError, which says what of a file is not so; see `reading`."""
    if not holds:
        raise ValueError(what)


def is_count(value: Any) -> bool:
    """Whether a value out of a file is a whole number that can count something."""
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value out of a file is a finite number."""
    # An int may be too large for a float.
    return type(value) in (int, float) and -1e300 < value < 1e300


def require_meant(path: os.PathLike | str, found: Mapping, meant: Mapping) -> None:
    """Raises OtherFile where a file says of itself what it is, and it is not that.

    Args:
      path: the file.
      found: name -> value, what it says.
      meant: name -> value, what the file there has to be.
    """
    if other := [name for name in meant if found.get(name) != meant[name]]:
        listed = "; ".join(
            f"{name} is {found.get(name)!r}, not {meant[name]!r}" for name in other
        )
        raise OtherFile(
            f"{os.fspath(path)!r} is whole, but not the file that belongs there: {listed}; put "
            "that one back, or delete this one and run the same command again to make it anew"
        )


def require_format(path: os.PathLike | str, found: Any) -> None:
    """Raises NewerFormat where a file's format is not one that this version knows.

    Args:
      path: the file.
      found: what it says of its format; None where it says nothing.
    """
    if found is not None and not (isinstance(found, int) and 1 <= found <= FORMAT):
        raise NewerFormat(
            f"{os.fspath(path)!r} has format {found}, and this version of lth_tf knows those up to "
            f"{FORMAT}: a later version wrote it; use that one (pip install --upgrade lth_tf)"
        )


@contextlib.contextmanager
def explained(path: os.PathLike | str, flag: str = "--workdir") -> Iterator[None]:
    """Turns a failure of the file system into a UserError that says what to do.

    Args:
      path: what is written.
      flag: what the user is to choose another of; where it is not the workdir, it is said for
        what is written within, too, which does not know it.
    """
    try:
        yield
    except (OSError, UserError) as found:
        inner = found.__cause__ if flag != "--workdir" else None
        error = found if isinstance(found, OSError) else inner
        if not isinstance(error, OSError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            advice = "the disk is full; free some space and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = f"it cannot be written; choose another {flag}"
        elif error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
            advice = (
                "a file is in the way of a folder, or a folder of a file; choose another name "
                f"for {flag}"
            )
        else:
            advice = f"choose another {flag}"
        raise UserError(
            f"cannot write {os.fspath(path)!r} ({os.strerror(error.errno or 0)}): {advice}; what "
            "is finished is kept"
        ) from error


def write(path: Path, content: bytes | str) -> None:
    """Writes a file beside its name and renames it: it exists only when it is finished.

    Raises:
      UserError: the disk is full, or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping) -> None:
    """Writes arrays and JSON-ready metadata; equal content gives equal bytes.

    All metadata go under one key as JSON with sorted keys: safetensors would write
    several keys in random order. They include a sha256 of the arrays and the rest.

    Args:
      path: the file.
      tensors: name -> array.
      metadata: what else it is to say, JSON-ready; FORMAT is added.

    Raises:
      UserError: see `write`.
    """
    metadata = {**metadata, "format_number": FORMAT}
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps({**metadata, "sha256": _checksum(arrays, metadata)}, sort_keys=True)
    write(path, safetensors.numpy.save(arrays, {METADATA_KEY: text}))


def _checksum(arrays: Mapping[str, np.ndarray], metadata: Mapping) -> str:
    text = json.dumps(metadata, sort_keys=True)
    return hashlib.sha256(f"{digest(arrays)} {text}".encode()).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns what `write_tensors` wrote.

    Raises:
      UserError: the file is absent, truncated, altered or not one of ours.
      NewerFormat: a later version wrote it.
    """
    with _ours(path), safetensors.safe_open(path, framework="numpy") as file:
        metadata = _metadata(file)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said, checksum = metadata.pop("sha256", None), _checksum(arrays, metadata)
    require_format(path, metadata.get("format_number"))
    if said != checksum:
        raise UserError(
            f"{os.fspath(path)!r} was altered: its checksum does not fit its content; delete it "
            "and run the same command again to make it anew"
        )
    metadata.pop("format_number", None)
    return arrays, metadata


def read_about(path: Path) -> dict[str, Any]:
    """Returns what a file of `write_tensors` says besides its arrays, without its checksum.

    Raises:
      UserError: see `read_tensors`.
    """
    with _ours(path), safetensors.safe_open(path, framework="numpy") as file:
        metadata = _metadata(file)
    require_format(path, metadata.get("format_number"))
    return metadata


def _ours(path: Path) -> contextlib.AbstractContextManager[None]:
    return reading(
        path,
        "is not a ticket of lth_tf, or truncated",
        "delete it and run the same command again to make it anew",
    )


def _metadata(file: Any) -> dict[str, Any]:
    metadata = json.loads((file.metadata() or {})[METADATA_KEY])
    require(isinstance(metadata, dict), "its metadata are no JSON object")
    return metadata


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
      UserError: the file is absent, damaged or holds something else.
    """
    with reading(path, "cannot be read", "delete it"):
        found = json.loads(path.read_text(encoding="utf-8"))
        require(isinstance(found, dict), "it holds no JSON object")
    return found


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the sha256 of names, types, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        total.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        total.update(array.data if array.size else b"")
    return total.hexdigest()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a folder for this process; the kernel lets go of it however the process ends.

    Raises:
      UserError: another process holds it, or the folder cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is working in {os.fspath(folder)!r}; wait for it to end or "
                "choose another --workdir"
            ) from None
        yield
