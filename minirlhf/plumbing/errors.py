"""The one error that a user can cause and mend."""


class UserError(ValueError):
    """Something a user can cause and mend: the message says what, where and how to mend it.

    `config.command_line` prints it and exits with 2. Any other exception is a bug and keeps its
    traceback.
    """
