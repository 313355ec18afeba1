"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in a config, a command or the input data, told in one line without a traceback.

    The message says what is wrong, where (file, key) and what to do. The command line prints it and exits with 2.
    """
