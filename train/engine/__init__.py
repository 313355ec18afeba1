"""The DeepSpeed engine behind one interface. This package is the only place that imports DeepSpeed."""

# First, as it decides how DeepSpeed is imported by the others.
import train.engine.setup  # noqa: F401
from train.engine.engine import Engine

__all__ = ["Engine"]
