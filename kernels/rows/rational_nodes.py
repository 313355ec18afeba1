"""Nodes z whose values of 1 / (s + z) give, for every s >= 0 at once, its values at all other z of an interval.

Adam's steps without a gradient move a weight by a sum of such terms, with s of the element and z growing from step to
step. For the functions z -> 1 / (s + z), interpolation is best in rational functions with poles on the negative axis:
with nodes z_1..z_P and poles -c_2..-c_P the error is, relative to the value itself,

    Phi(z) Psi(s),  Phi(z) = prod (z - z_p) / prod (z + c_p),  Psi(s) = prod (s - c_p) / prod (s + z_p)

up to its sign: it vanishes at the nodes, and for s = c_p, whose function is a pole of its own. Nodes and poles are
chosen in turn where Phi and Psi are largest, until their product is as small as required.

Everything is computed with IEEE operations and Python's powers, so that it is the same on every machine.

Shape suffixes: P nodes, N points.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_POINTS = 400  # at which Phi is evaluated, and as many for Psi


class RationalNodes:
    """Nodes for z in an interval.

    Args:
        least, most: ends of the interval; positive.
        weight: of an error at z: where it is small, values are met less closely.
        tolerance: the largest relative error times the weight.
    """

    def __init__(self, least: float, most: float, weight: Callable[[float], float], tolerance: float) -> None:
        nodes, poles = _choose(least, most, weight, tolerance)
        self.nodes = nodes
        """z_1, ..., z_P."""
        self._poles = poles
        gaps = [[1.0 if p == q else 1 / (p - q) for p in nodes] for q in nodes]
        self._inverse_gaps_PP = torch.tensor(gaps, dtype=torch.float64)
        self._nodes_P = torch.tensor(nodes, dtype=torch.float64)

    def shares(self, points_N: Tensor) -> Tensor:
        """The weight of the value at each node in the value at each point: f(z) is about shares @ f(nodes).

        Args:
            points_N: float64, in the interval; on the CPU.

        Returns:
            float64 [N, P]; a point's shares have the same bits whatever the other points.
        """
        shares_NP = torch.ones(len(points_N), len(self.nodes), dtype=torch.float64)
        for place, (node, inverse_gaps_P) in enumerate(zip(self.nodes, self._inverse_gaps_PP, strict=True)):
            factors_NP = (points_N - node)[:, None] * inverse_gaps_P
            factors_NP[:, place] = 1.0
            shares_NP *= factors_NP
        for pole in self._poles:
            shares_NP *= (self._nodes_P + pole) / (points_N + pole)[:, None]
        return shares_NP


def _choose(
    least: float, most: float, weight: Callable[[float], float], tolerance: float
) -> tuple[list[float], list[float]]:
    points = _spread(least, most)
    offsets = _spread(1e-3 * least, 1e6 * most)  # s; beyond them the functions hardly change shape
    phi, psi = [weight(z) for z in points], [1.0] * _POINTS
    nodes: list[float] = []
    poles: list[float] = []
    while True:
        node = points[_largest(phi)]
        nodes.append(node)
        phi = [value * (z - node) for value, z in zip(phi, points, strict=True)]
        psi = [value / (s + node) for value, s in zip(psi, offsets, strict=True)]
        if max(map(abs, phi)) * max(map(abs, psi)) <= tolerance:
            return nodes, poles
        pole = offsets[_largest(psi)]
        poles.append(pole)
        phi = [value / (z + pole) for value, z in zip(phi, points, strict=True)]
        psi = [value * (s - pole) for value, s in zip(psi, offsets, strict=True)]


def _spread(least: float, most: float) -> list[float]:
    return [least * math.pow(most / least, number / (_POINTS - 1)) for number in range(_POINTS)]


def _largest(values: list[float]) -> int:
    return max(range(len(values)), key=lambda place: abs(values[place]))
