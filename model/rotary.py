"""Rotary positions (RoFormer paper, section 3.4.2), on neighbouring pairs of columns as in DeepSeek's models.

Shape suffixes: B batch, T sequence, H heads, R rotary columns, P = R/2 pairs.
"""

import torch
from torch import Tensor


def rotary_angles(positions_BT: Tensor, columns: int, theta: float) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine [B, T, P] in fp32 of position * theta^(-2p/R), for any positions, without a table."""
    exponent_P = torch.arange(0, columns, 2, dtype=torch.float32, device=positions_BT.device) / columns
    angles_BTP = positions_BT.to(torch.float32).unsqueeze(-1) * theta**-exponent_P
    return angles_BTP.cos(), angles_BTP.sin()


def rotate(x_BTHR: Tensor, cosine_BTP: Tensor, sine_BTP: Tensor) -> Tensor:
    """Turns each pair of columns (2p, 2p+1) by its angle; computed in fp32 at least, returned in `x_BTHR`'s dtype."""
    even_BTHP, odd_BTHP = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    cosine, sine = cosine_BTP.unsqueeze(-2), sine_BTP.unsqueeze(-2)
    turned = torch.stack((even_BTHP * cosine - odd_BTHP * sine, even_BTHP * sine + odd_BTHP * cosine), dim=-1)
    return turned.flatten(-2).to(x_BTHR.dtype)
