"""What ends the opening of tables for a reason that is no bug."""


class Unavailable(ValueError):
    """This machine lacks what the config asks of the tables; the message is one line that says what to change."""
