"""The gated feed-forward network SwiGLU (Shazeer, "GLU variants improve transformer")."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Linear


class SwiGLU(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), bias-free; also the shared experts of a mixture."""

    def __init__(self, hidden_size: int, inner_size: int, *, std: float, output_std: float) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size, std)
        self.up_proj = Linear(hidden_size, inner_size, std)
        self.down_proj = Linear(inner_size, hidden_size, output_std)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps the last dimension; leading ones may be any."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
