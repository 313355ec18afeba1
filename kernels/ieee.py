"""Square roots rounded as IEEE 754 requires, so that they depend on neither the library nor the processor.

On CPUs torch takes them from a vector math library that may be off by one in the last place, differently from processor
to processor. Its division is exact, and so are roots on GPUs.
"""

import numpy as np
import torch
from torch import Tensor


def sqrt(values: Tensor, out: Tensor | None = None) -> Tensor:
    """The correctly rounded square root of each value, in their type."""
    if values.device.type != "cpu":
        return torch.sqrt(values, out=out)
    out = torch.empty_like(values) if out is None else out
    np.sqrt(values.numpy(), out=out.numpy())
    return out
