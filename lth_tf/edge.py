"""The outer edge of the commands: what goes wrong ends as one sentence and an exit code.

It imports nothing heavy, for it stands around the imports, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from lth_tf.errors import UserError, brief

INTERRUPTED = 130  # what a shell says of a process that SIGINT has ended
_GO_ON = "what is finished is kept, run the same command again to go on"


@contextlib.contextmanager
def outer() -> Iterator[None]:
    """Within, what `told` knows ends the process; any other exception keeps its traceback.

    What a terminal's encoding lacks is printed as '?'.

    Raises:
      SystemExit: with the exit code, after the sentence was printed to stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BaseException as error:
        said = told(error)
        if said is None:
            raise
        try:
            print(end="", flush=True)
        except OSError:  # nobody reads it, or the disk is full; Python would try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(said[0], file=sys.stderr)
        sys.exit(said[1])


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within, as `outer`, but Ctrl-C ends the process at once: nothing was begun yet.

    KeyboardInterrupt would be raised anywhere in what is imported, also where Python can only print
    it and go on.
    """
    handler = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    mine = main and handler is signal.default_int_handler
    stderr = os.dup(2) if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)

    def end(number: int, frame: FrameType | None) -> None:
        os.write(stderr, b"interrupted; nothing was begun yet\n")  # `compat` may have moved 2
        os._exit(INTERRUPTED)

    if mine:
        signal.signal(signal.SIGINT, end)
    try:
        with outer():
            try:
                yield
            except ImportError as error:
                raise UserError(
                    f"a package is missing or broken ({brief(error)}); lth-doctor says which, and "
                    "what mends it"
                ) from error
    finally:
        if mine:
            signal.signal(signal.SIGINT, handler)
        os.close(stderr)


def told(error: BaseException) -> tuple[str, int] | None:
    """Returns the sentence and the exit code for an exception; None for a fault of this package."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # some come from TensorFlow
    if isinstance(error, UserError) or "InvariantError" in kinds:
        return f"error: {error}", getattr(error, "code", 1)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {str(error) or _GO_ON}", INTERRUPTED
    if isinstance(error, MemoryError) or "ResourceExhaustedError" in kinds:
        return (
            f"error: the memory is too small ({brief(error)}); take a smaller --model, --width, "
            f"--batch_size or --score_batch_size, or a machine with more; {_GO_ON}"
        ), 1
    if isinstance(error, UnicodeError):
        return (
            f"error: a text is not in the encoding that is expected here ({brief(error)}); save "
            "files as UTF-8, or set PYTHONUTF8=1"
        ), 1
    if isinstance(error, OSError):
        return f"error: {_of_the_system(error)}", 1
    return None


def _of_the_system(error: OSError) -> str:
    """The sentence for an error of the operating system that nobody has explained before."""
    known = error.filename is not None
    what = f"{str(error.filename)!r} " if known else "a file, or what is printed, "
    why = error.strerror or str(error) or type(error).__name__
    if "temporary directory" in why:
        return f"{why[0].lower()}{why[1:]}; set TMPDIR to a folder that can be written"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{what}cannot be written ({why}): free some space; {_GO_ON}"
    if isinstance(error, BrokenPipeError):
        return f"nobody reads what is printed ({why}); {_GO_ON}"
    return f"{what}cannot be used ({why}): mend that, or give another file or folder; {_GO_ON}"


def require_temporary() -> None:
    """Raises UserError where no temporary file can be made: TensorFlow and matplotlib need some."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(_of_the_system(error)) from error


def path(given: str | os.PathLike, what: str) -> Path:
    """Returns the path of a file.

    Args:
      given: by the user.
      what: it is of, as a sentence begins: 'a ticket'.

    Raises:
      UserError: it is no path.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UserError(f"{what} is read from its path, not from {type(given).__name__}")
    return Path(given)


def folder(given: str | os.PathLike) -> Path:
    """Returns the path of a folder as people write it: ~ is their home.

    Raises:
      UserError: it is empty or a URL, or there is no home.
    """
    if not isinstance(given, (str, os.PathLike)):
        raise UserError(f"a folder is given by its path, not by {type(given).__name__}")
    text = os.fspath(given)
    if not text:
        raise UserError("'' is no folder; give one, or leave that flag out")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise UserError(
            f"{text!r} is not a folder of this machine; give a local one, and copy what is there"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{text!r} cannot be found: there is no home folder to put for ~; set HOME, or write "
            "the whole path"
        ) from error
