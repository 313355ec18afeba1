"""What ends a command for a reason that is not a bug."""


class UserError(ValueError):
    """A mistake in a config, a command or the input data, reported in one line without a traceback.

    The message says what is wrong, where (file, key) and what to do. The command line prints it and exits with 2.
    """


class Interrupted(BaseException):
    """A signal ended a run between two steps; the message says where it is saved, and `code` is the exit code."""

    def __init__(self, told: str, code: int) -> None:
        super().__init__(told)
        self.code = code


class Hung(RuntimeError):
    """No rank makes progress any more; the message names the one that the others wait for, its step and stage."""
