"""The key of the random numbers with which rows are rounded. See `kernels.rows.stochastic_rounding`."""

from kernels.splitmix64 import derived_key


def rounding_key(seed: int, step: int) -> int:
    """The key of all random numbers of an update: an unsigned 64-bit integer. Any integers."""
    return derived_key(step, derived_key(seed + 1))
