"""The Engram module: gates looked-up memory into the residual stream (Engram paper, equations 3 to 6).

    e = the token's rows side by side              k_m = W_K,m e        v = W_V e
    v~_m = gate(h_m, k_m) v                        Y_m = SiLU(Conv(RMSNorm(v~)))_m + v~_m

The caller adds Y to the residual stream, before attention. The rows come from outside; which ones they are is not known
here.

Vectors per branch (norm weights, convolution taps) are kept flat, as 1-D parameters: optimizers that pick matrices by
their rank, as Muon does, would take [M, D] for one.

Shape suffixes: B batch, T sequence, M branches of the residual stream, D hidden, S rows per token, U unique rows, E = S
* row_dim memory width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gate import engram_gate, gate_of, gate_openings
from kernels.gather import RowIndex, gather
from model.config import EngramConfig
from model.layers import Linear

GATE_UNIT = 2.0**-20


class MemoryRows(NamedTuple):
    """What a micro-batch reads of one table."""

    rows_UD: Tensor
    """fp32 [U, row_dim]: the step's rows, each once; a leaf that collects their gradients."""
    index: RowIndex  # type: ignore[assignment]  # hides tuple.index, of no use here
    """The row of every lookup, in (b, t, sub-table) order."""

    def to(self, device: torch.device) -> "MemoryRows":
        """The same on `device`."""
        return MemoryRows(self.rows_UD.to(device), self.index.to(device))


class Engram(nn.Module):
    """Projections, gate and convolution for a residual stream of `branches` branches.

    The value projection is shared by the branches; the key projections, the norms and the convolution are not.
    """

    def __init__(self, config: EngramConfig, hidden_size: int, *, branches: int, norm_eps: float, std: float) -> None:
        super().__init__()
        self.config = config
        self.branches = branches
        self.value_proj = Linear(config.memory_width, hidden_size, std)
        self.key_projs = nn.ModuleList(Linear(config.memory_width, hidden_size, std) for _ in range(branches))
        self.query_norm_weight = nn.Parameter(torch.ones(branches * hidden_size))
        self.key_norm_weight = nn.Parameter(torch.ones(branches * hidden_size))
        self.opened: Tensor | None = None
        """Where somebody counts them: int64 [3], how many gates were computed in training, the sum of their openings in
        units of GATE_UNIT, and how many were open by more than half."""
        self.convolution = None
        if config.convolution:
            self.convolution = ShortConvolution(config, hidden_size, branches=branches, norm_eps=norm_eps)

    def forward(self, hidden_BTMD: Tensor, memory: MemoryRows, positions_BT: Tensor) -> Tensor:
        """Returns Y [B, T, M, D] in the dtype of `hidden_BTMD`. `positions_BT` counts within documents.

        Raises:
            ValueError: the index does not hold B * T * S lookups.
        """
        memory_BTE = self._lookup(memory, hidden_BTMD)
        key_BTMD = torch.stack([project(memory_BTE) for project in self.key_projs], dim=2)
        gated_BTMD, score_BTM = engram_gate(
            hidden_BTMD,
            key_BTMD,
            self.value_proj(memory_BTE),
            self.query_norm_weight.view(self.branches, -1),
            self.key_norm_weight.view(self.branches, -1),
            eps=self.config.gate_eps,
            signed_sqrt=self.config.gate == "signed_sqrt",
        )
        # Not in evaluations. Twice where a block is recomputed, which changes no mean.
        if self.opened is not None and torch.is_grad_enabled():
            self.opened += _summed(gate_of(score_BTM, self.config.gate == "signed_sqrt"))
        return gated_BTMD if self.convolution is None else self.convolution(gated_BTMD, positions_BT)

    @torch.no_grad()
    def openings(self, hidden_BTMD: Tensor, memory: MemoryRows) -> Tensor:
        """How far the gate of each token and branch opens, fp32 [B, T, M] from 0 to 1; arguments as for `forward`."""
        memory_BTE = self._lookup(memory, hidden_BTMD)
        return gate_openings(
            hidden_BTMD,
            torch.stack([project(memory_BTE) for project in self.key_projs], dim=2),
            self.query_norm_weight.view(self.branches, -1),
            self.key_norm_weight.view(self.branches, -1),
            eps=self.config.gate_eps,
            signed_sqrt=self.config.gate == "signed_sqrt",
        )

    def _lookup(self, memory: MemoryRows, hidden_BTMD: Tensor) -> Tensor:
        batch, length = hidden_BTMD.shape[:2]
        lookups = memory.index.segment_N.numel()
        if lookups != batch * length * self.config.lookups_per_token:
            raise ValueError(
                f"{lookups} lookups for {batch} x {length} tokens of {self.config.lookups_per_token} rows each"
            )
        return gather(memory.rows_UD, memory.index, out_dtype=hidden_BTMD.dtype).view(batch, length, -1)


def _summed(opening_BTM: Tensor) -> Tensor:
    # Whole numbers: their sum does not depend on its order.
    parts_PBTM = torch.stack(
        [torch.ones_like(opening_BTM), opening_BTM / GATE_UNIT, (opening_BTM > 0.5).to(opening_BTM)]
    )
    return parts_PBTM.round().long().flatten(1).sum(dim=1)


class ShortConvolution(nn.Module):
    """x -> SiLU(Conv(RMSNorm(x))) + x: causal, depthwise, dilated by the largest n-gram order; the identity at first.

    Tap j of output t reads t - j * dilation, and counts as zero where that lies before the start of the document (of
    the sequence, with `cross_documents`).
    """

    def __init__(self, config: EngramConfig, hidden_size: int, *, branches: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.norm_eps = norm_eps
        channels = branches * hidden_size
        self.norm_weight = nn.Parameter(torch.ones(channels))
        self.weight = nn.Parameter(torch.zeros(config.kernel_size * channels))

    def forward(self, values_BTMD: Tensor, positions_BT: Tensor) -> Tensor:
        """Returns [B, T, M, D] in the dtype of `values_BTMD`; the taps are summed in fp32 at least."""
        length, branches, width = values_BTMD.shape[1:]
        normed = F.rms_norm(values_BTMD, (width,), eps=self.norm_eps) * self.norm_weight.view(branches, width)
        normed = normed.to(torch.promote_types(normed.dtype, torch.float32))
        taps = self.weight.view(-1, branches, width)
        total = normed * taps[0]
        for tap in range(1, self.config.kernel_size):
            distance = tap * max(self.config.orders)
            if distance >= length:
                break
            earlier = F.pad(normed[:, :-distance], (0, 0, 0, 0, distance, 0))
            if not self.config.cross_documents:
                outside = (positions_BT < distance)[:, :, None, None]
                earlier = earlier.masked_fill(outside, 0.0)
            total = total + earlier * taps[tap]
        return F.silu(total).to(values_BTMD.dtype) + values_BTMD
