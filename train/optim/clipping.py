"""The one clip of a step: raw gradients of the backbone and of the tables together."""

import math


def clip_scale(norm_squared: float, max_norm: float | None) -> float:
    """Factor in (0, 1] that brings gradients with this squared L2 norm down to the norm `max_norm`.

    `None` never clips. Raises ValueError for a norm that is not finite: such a step is to be skipped, not scaled.
    """
    if not math.isfinite(norm_squared):
        raise ValueError(f"gradients with squared norm {norm_squared} cannot be clipped; skip the step")
    norm = math.sqrt(norm_squared)
    return 1.0 if max_norm is None or norm <= max_norm else max_norm / norm
