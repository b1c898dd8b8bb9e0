"""The one exception that stands for a mistake the user can mend."""


class UserError(ValueError):
    """What was given, what is allowed and what to do, in one sentence.

    The command-line tools print the message and exit with status `code`; any other
    exception is a fault of this package and keeps its traceback.
    """

    code = 1
