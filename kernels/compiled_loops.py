"""Whether the loops that Numba compiles can be used here."""

from functools import cache
from importlib.util import find_spec


@cache
def available() -> bool:
    """Whether Numba is installed and takes the NumPy that is: it refuses to be imported beside a newer one."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
