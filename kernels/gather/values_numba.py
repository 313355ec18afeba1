"""Rows read where they are stored, compiled for a CPU: every lookup's row is written once, and nothing else.

Shape suffixes as in `kernels.gather.values`.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.numba_intrinsics import ask, compiled, fence, stream_line
from kernels.threads import split_rows

_AHEAD = 8  # lookups
_LINE = 64
_STREAMED = 16 << 20  # bytes: more than what a core's share of the last cache holds


def gather_rows(
    table_CW: Tensor, places_V: Tensor, apart_UD: Tensor, segment_N: Tensor, out_ND: Tensor, *, bf16: bool
) -> None:
    """Writes the row of every lookup to `out_ND`, contiguous, of float32 or bfloat16."""
    arrays = (
        table_CW.numpy(), table_CW.view(torch.int16).numpy().view(np.uint16), bf16,
        places_V.numpy(), apart_UD.numpy(), segment_N.numpy(),
    )  # fmt: skip
    if out_ND.dtype == torch.bfloat16:
        out = out_ND.view(torch.int16).numpy().view(np.uint16)
        split_rows(len(out), lambda start, end: _gather_rounded(*arrays, out, start, end))
        return
    streams = not bf16 and out_ND.nbytes >= _STREAMED and not (out_ND.data_ptr() | 4 * out_ND.shape[1]) % _LINE
    split_rows(len(out_ND), lambda start, end: _gather(*arrays, out_ND.numpy(), streams, start, end))


# What is done for a lookup is written out: calls of functions with arrays would take longer than the copy.


@compiled
def _gather(  # type: ignore[no-untyped-def]  # noqa: C901
    records, halves, bf16, places, apart, segments, out, streams, start, end
):  # fmt: skip
    dim = out.shape[1]
    for lookup in range(start, end):
        if lookup + _AHEAD < end:
            ahead = places[segments[lookup + _AHEAD]]
            if ahead >= 0:
                ask(records, ahead, dim)
        place = places[segments[lookup]]
        if place < 0:
            for column in range(dim):
                out[lookup, column] = apart[~place, column]
        elif streams:
            source = records.ctypes.data + place * records.strides[0]
            target = out.ctypes.data + lookup * out.strides[0]
            for offset in range(0, 4 * dim, _LINE):
                stream_line(target + offset, source + offset)
        elif bf16:
            bits = out[lookup].view(np.uint32)
            for column in range(dim):
                bits[column] = np.uint32(halves[place, column]) << 16
        else:
            for column in range(dim):
                out[lookup, column] = records[place, column]
    if streams:
        fence()


@compiled
def _gather_rounded(records, halves, bf16, places, apart, segments, out, start, end):  # type: ignore[no-untyped-def]
    dim = out.shape[1]
    for lookup in range(start, end):
        place = places[segments[lookup]]
        if place < 0:
            for column in range(dim):
                out[lookup, column] = _nearest(apart[~place, column])
        elif bf16:
            for column in range(dim):
                out[lookup, column] = halves[place, column]
        else:
            for column in range(dim):
                out[lookup, column] = _nearest(records[place, column])


@compiled
def _nearest(value):  # type: ignore[no-untyped-def]
    """The bits of the nearest bfloat16, the even one of two; of what is not a number, one that is not."""
    bits = np.float32(value).view(np.uint32)
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
