"""Rows of Adam with a weight that no later step changes, or just not: each breaks another condition for a rest."""

import pytest

each_resting = pytest.mark.parametrize(
    ("weight", "exp_avg", "exp_avg_sq", "lr", "betas", "eps"),
    [
        (0.02, 1e-4, 1e-8, 1e-3, (0.9, 0.95), 1e-8),  # as in training
        (1.0, 1e-10, 1e-4, 1e-3, (0.99, 0.5), 1e-8),  # the second moment falls faster than the square of the first
        (1.0, 1e-10, 1e-4, 1e-1, (0.7, 0.5), 1e-40),  # it falls to zero, the first sticks at a denormal, eps is less
        (1e-20, 1e-44, 1e-30, 1.0, (0.9, 0.9), 2.0**-62),  # the first moment is a denormal and falls no further
        (1.0, 0.0, 1e-4, 1e-3, (0.9, 0.999), 1e-8),  # the weight rests, and the second moment falls on
        (-0.0, -1e-45, 0.0, 1e-3, (0.9, 0.999), 1e-8),  # signs of zeros
    ],
)
