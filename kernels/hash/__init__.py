"""Hashes the n-grams that end at every token to rows of the memory tables.

B batch, T sequence, S sub-tables (orders x heads), K multipliers (the largest order), L modules.
"""

from torch import Tensor

from kernels.hash.reference import hash_ngrams_reference
from kernels.hash.spec import HashSpec

__all__ = ["HashSpec", "hash_ngrams"]


def hash_ngrams(
    tokens_BT: Tensor, positions_BT: Tensor, spec: HashSpec, *, compressed_V: Tensor | None = None
) -> Tensor:
    """The rows that every token reads in the module's table: int64 [B, T, S], or [L, B, T, S] for stacked modules.

    With x the token ids looked back at and m the multipliers, a token takes from a sub-table of order n the row
    (x_0 m_0 xor ... xor x_{n-1} m_{n-1}) mod p, p being its prime (Engram, arXiv 2601.07372, section 2.2, in the
    released form of its demo and of DeepSeek-V4.1). A look-back that leaves the document, or the sequence where
    `spec.cross_documents`, takes the pad id, and so do all longer ones.

    Args:
        tokens_BT: integer compressed token ids, none negative, which is not checked.
        positions_BT: integer position of every token in its document, 0 at the first one in this sequence.
        spec: the hash, its tensors on the device of the tokens.
        compressed_V: compressed id of every raw one, if the tokens are raw ids. For ids beyond it a GPU takes the pad
            id, because reporting them would make the host wait; the CPU raises an IndexError.
    """
    if tokens_BT.is_cuda:
        from kernels.hash.triton import hash_ngrams_triton

        return hash_ngrams_triton(tokens_BT, positions_BT, spec, compressed_V)
    return hash_ngrams_reference(tokens_BT, positions_BT, spec, compressed_V)
