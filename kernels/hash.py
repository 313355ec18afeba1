"""Hashes the n-grams that end at every token to rows of the memory tables.

B batch, T sequence, S slots a token (orders x heads), K multipliers (the largest order), L modules.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class HashSpec:
    """The numbers that turn token ids into rows, of one module or of several that hash the same tokens.

    Slots are ordered by n-gram order, then by head. The tensors of L modules are stacked in a leading dimension;
    those of a single module have none.
    """

    multipliers_LK: Tensor
    """int64 [K] or [L, K]; the first multiplies the current token. Every product with a token id fits in int64."""
    moduli_LS: Tensor
    """int64 [S] or [L, S]; the rows of every slot's table, a prime number or 1."""
    offsets_LS: Tensor
    """int64 [S] or [L, S]; the row at which every slot's table starts."""
    orders: tuple[int, ...]
    """N-gram orders, at least 1, increasing; the last is K."""
    pad_id: int
    """The (compressed) token id that stands where an n-gram reaches before its document."""
    cross_documents: bool = False
    """Whether an n-gram may reach into the previous document of the same sequence."""

    def to(self, device: torch.device | str) -> Self:
        """The same numbers with their tensors on `device`."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value.to(device) for name, value in moved.items() if isinstance(value, Tensor)}
        return type(self)(**{**moved, **tensors})

    @cached_property
    def reciprocals_LS(self) -> Tensor:
        """floor((2^64 - 1) / modulus) of every slot, shaped as the moduli: the bits of an unsigned word, in int64."""
        largest = 2**63 - 1  # 2^64 - 1 = 2 * largest + 1, with nothing above int64 on the way
        rest_LS = largest % self.moduli_LS
        carry_LS = rest_LS >= self.moduli_LS - 1 - rest_LS
        return largest // self.moduli_LS * 2 + carry_LS


def hash_ngrams(
    tokens_BT: Tensor, positions_BT: Tensor, spec: HashSpec, *, compressed_V: Tensor | None = None
) -> Tensor:
    """Row of every slot of every token, in the module's table: int64 [B, T, S], or [L, B, T, S] for stacked modules.

    With x the token ids looked back at and m the multipliers, the order-n slots of a token take the row
    (x_0 m_0 xor ... xor x_{n-1} m_{n-1}) mod p, p being the slot's prime (Engram, arXiv 2601.07372, section 2.2, in
    the released form of its demo and of DeepSeek-V4.1). A look-back that leaves the document, or the sequence where
    `spec.cross_documents`, takes the pad id, and so do all longer ones.

    Args:
        tokens_BT: integer compressed token ids, none negative. Negative ids are not looked for.
        positions_BT: integer position of every token in its document, 0 at the first one in this sequence.
        spec: the hash, its tensors on the device of the tokens.
        compressed_V: compressed id of every raw one, if the tokens are raw ids. A GPU takes the pad id for ids that it
            does not hold, because to report them would make the host wait; the CPU raises an IndexError.
    """
    if tokens_BT.is_cuda:
        from kernels.hash_triton import hash_ngrams_triton

        return hash_ngrams_triton(tokens_BT, positions_BT, spec, compressed_V)
    return hash_ngrams_reference(tokens_BT, positions_BT, spec, compressed_V)


def hash_ngrams_reference(
    tokens_BT: Tensor, positions_BT: Tensor, spec: HashSpec, compressed_V: Tensor | None = None
) -> Tensor:
    """`hash_ngrams` in PyTorch's operations, on any device."""
    if compressed_V is not None:
        tokens_BT = compressed_V[tokens_BT.long()]
    # No sign enters anywhere: products stay below 2**63 by the choice of the multipliers, and so does their XOR.
    mix_LBT = torch.zeros((), dtype=torch.int64, device=tokens_BT.device)
    mixes = []
    for distance in range(spec.orders[-1]):
        ids_BT = _look_back(tokens_BT, positions_BT, distance, spec)
        mix_LBT = mix_LBT ^ (ids_BT * spec.multipliers_LK[..., distance, None, None])
        if distance + 1 in spec.orders:
            mixes.append(mix_LBT)
    heads = spec.moduli_LS.shape[-1] // len(spec.orders)
    mix_LBTS = torch.stack(mixes, dim=-1).repeat_interleave(heads, dim=-1)
    return mix_LBTS.remainder_(spec.moduli_LS[..., None, None, :]).add_(spec.offsets_LS[..., None, None, :])


def _look_back(tokens_BT: Tensor, positions_BT: Tensor, distance: int, spec: HashSpec) -> Tensor:
    ids_BT = tokens_BT.to(torch.int64)
    if distance == 0:
        return ids_BT
    length = tokens_BT.shape[1]
    blocked = min(distance, length)
    shifted_BT = pad(ids_BT[:, : length - blocked], (blocked, 0), value=spec.pad_id)
    if spec.cross_documents:
        return shifted_BT
    return torch.where(positions_BT >= distance, shifted_BT, spec.pad_id)
