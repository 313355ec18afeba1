"""The kernels that carry records, by their names in a profile. Light to import, for those who read profiles alone."""

import re

CARRIERS = {"fetch": re.compile(r"_fetch(_lines)?\b"), "write back": re.compile(r"_write(_lines)?\b")}
"""By what they do; see `kernels.records.triton`."""
