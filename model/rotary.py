"""Rotary positions (RoFormer paper, section 3.4.2), on neighbouring pairs of columns as in DeepSeek's models.

For sequences longer than those a model was trained on, YaRN (Peng et al. 2023, arXiv 2309.00071) in DeepSeek's form:
pairs that turn often in the original length keep their frequency, pairs that turn seldom have it divided by the factor
s, and between the two, from pair to pair, frequencies change linearly; attention becomes sharper by a temperature.

Shape suffixes: B batch, T sequence, H heads, R rotary columns, P = R/2 pairs.
"""

import math

import torch
from torch import Tensor

from model.config import RopeScalingConfig


def rotary_angles(
    positions_BT: Tensor, columns: int, theta: float, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, T, P] in fp32 of position * frequency, for any positions, without a table."""
    frequencies_P = rotary_frequencies(columns, theta, scaling, positions_BT.device)
    angles_BTP = positions_BT.to(torch.float32).unsqueeze(-1) * frequencies_P
    return angles_BTP.cos(), angles_BTP.sin()


def rotary_frequencies(
    columns: int, theta: float, scaling: RopeScalingConfig | None = None, device: torch.device | None = None
) -> Tensor:
    """Returns [P] in fp32, radians per token: theta^(-2p/R), with `scaling` interpolated (YaRN paper, section 3.2)."""
    exponent_P = torch.arange(0, columns, 2, dtype=torch.float32, device=device) / columns
    frequencies_P = theta**-exponent_P
    if scaling is None:
        return frequencies_P
    first, last = _interpolated_range(columns, theta, scaling)
    pair_P = torch.arange(columns // 2, dtype=torch.float32, device=device)
    share_P = ((pair_P - first) / (last - first)).clamp(0, 1)
    return frequencies_P * (1 - share_P) + frequencies_P / scaling.factor * share_P


def attention_scale(query_columns: int, scaling: RopeScalingConfig | None = None) -> float:
    """The factor on products of queries and keys: 1/sqrt(columns), with YaRN times (0.1 f ln s + 1)^2.

    As in DeepSeek's code, where `mscale_all_dim` is f: both queries and keys count as longer, in all columns.
    """
    longer = 1.0 if scaling is None else 0.1 * scaling.mscale * math.log(scaling.factor) + 1.0
    return longer * longer / math.sqrt(query_columns)


def rotate(x_BTHR: Tensor, cosine_BTP: Tensor, sine_BTP: Tensor) -> Tensor:
    """Turns each pair of columns (2p, 2p+1) by its angle; computed in fp32 at least, returned in `x_BTHR`'s dtype."""
    even_BTHP, odd_BTHP = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    cosine, sine = cosine_BTP.unsqueeze(-2), sine_BTP.unsqueeze(-2)
    turned = torch.stack((even_BTHP * cosine - odd_BTHP * sine, even_BTHP * sine + odd_BTHP * cosine), dim=-1)
    return turned.flatten(-2).to(x_BTHR.dtype)


def _interpolated_range(columns: int, theta: float, scaling: RopeScalingConfig) -> tuple[float, float]:
    """The last pair that keeps its frequency and the first whose frequency is divided by the whole factor."""

    def pair_that_turns(times: float) -> float:
        # theta^(-2p/R) * length = 2 pi * times, for p.
        return columns * math.log(scaling.original_length / (2 * math.pi * times)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta)), 0)
    last = min(math.ceil(pair_that_turns(scaling.alpha)), columns - 1)
    return first, last if last > first else first + 1e-3
