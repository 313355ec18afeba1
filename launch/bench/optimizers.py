"""The row optimizers by their names on the command line. Importing this does not import torch: help must not wait."""

from collections.abc import Iterator
from typing import Any

from offload.optimizers import OPTIMIZERS as _BY_TYPE


def _named() -> Iterator[tuple[str, dict[str, Any]]]:
    for type_, optimizer in _BY_TYPE.items():
        name = type_.replace("_", "-")
        if optimizer.moves_resting_rows:  # else what `untouched_rows` says costs little
            yield name, {"type": type_, "untouched_rows": "exact"}
            yield f"{name}-closed", {"type": type_, "untouched_rows": "closed"}
            yield f"{name}-lazy", {"type": type_, "untouched_rows": "lazy"}
        else:
            yield name, {"type": type_}
        for dtype in optimizer.state_dtypes:
            if dtype != "fp32":
                yield f"{name}-{dtype}-state", {"type": type_, "state_dtype": dtype}


OPTIMIZERS = dict(_named())
"""The `offload.optimizer` section by name."""
