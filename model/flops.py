"""Floating-point operations of training on one token, as model FLOPs utilisation counts them.

    6 P + 6 L H (d_qk + d_v) (T + 1) / 2

P: parameters in matrices that a token is multiplied by (`Census.multiplied`), each in one multiply-add of the forward
pass and two of the backward pass, two operations each. L layers, H heads, d_qk and d_v columns of a head's query and
value, T sequence length: attention's two products, with every key up to the token's own, (T + 1) / 2 on average. This
is the count of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B: 6 N + 12 L H Q T) with the two kinds of head
columns of MLA, active parameters only, and without the masked half of the attention.

Not counted: lookups, norms, gates, convolutions, the mixing of branches, the optimizer, and whatever is recomputed.
"""

from typing import NamedTuple

from model.census import Census
from model.config import ModelConfig


class Flops(NamedTuple):
    """Operations for one token, forward and backward."""

    matrices: int
    """In products with parameters."""
    attention: int
    """In products of queries with keys, and of attention weights with values."""

    @property
    def total(self) -> int:
        """Both."""
        return self.matrices + self.attention


def flops_per_token(config: ModelConfig, census: Census, sequence_length: int) -> Flops:
    """Counts for a token of a sequence of `sequence_length` tokens that is one document, on average."""
    attention = config.attention
    columns = attention.heads * (attention.qk_nope_dim + attention.qk_rope_dim + attention.v_dim)
    return Flops(6 * census.multiplied, 3 * config.num_layers * columns * (sequence_length + 1))
