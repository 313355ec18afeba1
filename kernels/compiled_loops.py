"""Whether the loops compiled by Numba can be used here."""

from functools import cache
from importlib.util import find_spec


@cache
def available() -> bool:
    """Whether Numba is installed and supports the installed NumPy: with a newer one, importing it fails."""
    if find_spec("numba") is None:
        return False
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True
