"""Manifold-constrained hyper-connections, mHC (Xie et al. 2025, arXiv 2512.24880): a residual stream of n branches.

Around a sublayer F (attention, feed-forward), with the stream x [n, D] of a token:

    x  <-  H_res x + H_post^T F(H_pre x)

    l_pre, l_post, l_res = alpha * (P RMSNorm(vec x)) + b             equation 7; alpha one factor for each of the three
    H_pre = sigmoid(l_pre)   H_post = 2 sigmoid(l_post)   H_res = Sinkhorn(l_res)          equation 8; norm weight in P

H_res is doubly stochastic: its products over the layers are too, so that neither signals nor gradients can grow.

Start: P = 0, alpha = 0.01 (as in the paper), H_post = 1, and H_pre, H_res close to the one branch of index (sublayer
mod n) and to the identity (ours; the paper states no b). The stream is n copies of the embedding and ends as the mean
of its branches, which the final norm cannot tell from their sum. All branches stay equal as long as all get the same,
so before training the network computes what it would with a plain residual, up to rounding and the norms' eps (H_pre
sums to 1.1, not 1, for n = 4, which the norm that follows cancels). With Engram each branch has a gate of its own from
the beginning. Branches learn to differ because each sublayer starts out reading a branch of its own.

Everything is computed in fp32, from the stream and the parameters as they are: in a bf16 model P, alpha and b are
rounded to bf16 like every parameter; the optimizer's master copies of them are not.

Kept for the backward, per token and block of two sublayers, beyond what a plain residual keeps (b bytes per element):

    (n + 2) D b + 4 (7 n^2 + 16 n + 3) bytes        the stream at the block's start, two outputs, small coefficients

The stream between the sublayers, the norms and all Sinkhorn iterations are computed again in the backward. With n = 4,
D = 2560 in bf16 that is 31.4 kB; the equations written in PyTorch keep 478 kB, in fp32 copies and iterations.

Shape suffixes: B batch, T sequence, M branches (n), D hidden, J = 1 or M, I parts of the stream (see kernels.branches).
"""

import torch
from torch import Tensor, nn

from kernels.branches import mix_branches, project_branches
from kernels.branches.maps import compose, stream_mappings
from kernels.branches.sinkhorn import sinkhorn
from model.config import HyperConnectionsConfig

_LEANING = 3.0
"""Magnitude of the initial biases: sigmoid(3) = 0.95, sigmoid(-3) = 0.05."""


class HyperConnection(nn.Module):
    """The three mappings of one sublayer, computed anew for every token."""

    def __init__(self, config: HyperConnectionsConfig, hidden_size: int, *, sublayer: int, norm_eps: float) -> None:
        """
        Args:
            config: the `hyper_connections` section.
            hidden_size: D.
            sublayer: number of the sublayer in the network, from 0.
            norm_eps: added to the mean square under the norm.
        """
        super().__init__()
        branches = config.expansion
        self.config, self.norm_eps = config, norm_eps
        self.weight = nn.Parameter(torch.zeros(branches * (branches + 2), branches * hidden_size))
        self.bias = nn.Parameter(_first_bias(branches, sublayer % branches))
        self.alpha = nn.Parameter(torch.full((3,), config.alpha_init))

    def forward(
        self, weights_BTMI: Tensor | None, base_BTMD: Tensor, *outputs_BTD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns H_pre [B, T, M], H_post [B, T, M] and H_res [B, T, M, M] in fp32 (fp64 for fp64).

        The arguments are the stream, in the form of `kernels.branches`.
        """
        projected = project_branches(self.weight, weights_BTMI, base_BTMD, *outputs_BTD, eps=self.norm_eps)
        pre, post, logits = stream_mappings(projected, self.alpha, self.bias)
        return pre, post, sinkhorn(logits, self.config.sinkhorn_iterations)


class BranchedStream:
    """The residual stream on its way through a block.

    Example:
        >>> stream = BranchedStream(stream_BTMD)
        >>> stream.write(sublayer(stream.read(connection)))
        >>> stream_BTMD = stream.merged()
    """

    def __init__(self, stream_BTMD: Tensor) -> None:
        self._base = stream_BTMD
        self._outputs: tuple[Tensor, ...] = ()
        self._weights: Tensor | None = None
        self._written: tuple[Tensor, Tensor] | None = None

    def read(self, connection: HyperConnection) -> Tensor:
        """Returns H_pre x, the sublayer's input [B, T, D]. Its output is to be given to `write`."""
        pre, post, res = connection(self._weights, self._base, *self._outputs)
        self._written = (post, res)
        weights_BTJI = compose(pre.unsqueeze(2), self._weights)
        return mix_branches(weights_BTJI, self._base, *self._outputs).squeeze(2)

    def write(self, output_BTD: Tensor) -> None:
        """Makes the stream H_res x + H_post^T F, with the mappings of the preceding `read`."""
        if self._written is None:
            raise RuntimeError("a sublayer's output can be written once, after its input was read")
        post, res = self._written
        self._weights = compose(res, self._weights, post)
        self._outputs, self._written = (*self._outputs, output_BTD), None

    def merged(self) -> Tensor:
        """Returns the stream [B, T, M, D] in the dtype it began with."""
        return self._base if self._weights is None else mix_branches(self._weights, self._base, *self._outputs)


def replicate(hidden_BTD: Tensor, branches: int) -> Tensor:
    """The stream that begins with the same state in each branch, [B, T, M, D]; a view."""
    return hidden_BTD.unsqueeze(2).expand(-1, -1, branches, -1)


def _first_bias(branches: int, home: int) -> Tensor:
    """b: reading favours the branch `home`, writing goes to all alike, and the branches stay apart."""
    lean_M = torch.full((branches,), -_LEANING)
    lean_M[home] = _LEANING
    keep_MM = _LEANING * (2 * torch.eye(branches) - 1)
    return torch.cat((lean_M, torch.zeros(branches), keep_MM.flatten()))
