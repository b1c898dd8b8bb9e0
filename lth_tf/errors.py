"""The one exception that stands for a mistake the user can mend."""

from __future__ import annotations

import re


class UserError(ValueError):
    """What was given, what is allowed and what to do, in one sentence.

    The command-line tools print the message and exit with status `code`; any other
    exception is a fault of this package and keeps its traceback.
    """

    code = 1


def brief(error: BaseException) -> str:
    """Returns the kind of an error and the beginning of its first line."""
    text = re.sub(r"\{\{.*?\}\} *", "", str(error))  # names of nodes in TensorFlow's errors
    first = (text.strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:100]}"
