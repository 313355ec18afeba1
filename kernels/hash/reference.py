"""The hash in plain PyTorch. Shape suffixes as in `kernels.hash`."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.hash.spec import HashSpec


def hash_ngrams_reference(
    tokens_BT: Tensor, positions_BT: Tensor, spec: HashSpec, compressed_V: Tensor | None = None
) -> Tensor:
    """See `kernels.hash.hash_ngrams`; on any device."""
    if compressed_V is not None:
        tokens_BT = compressed_V[tokens_BT.long()]
    # Nothing is ever negative: products stay below 2**63 by the choice of the multipliers, and so does their XOR.
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
