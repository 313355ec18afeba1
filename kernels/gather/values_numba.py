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
    places, apart, segments = places_V.numpy(), apart_UD.numpy(), segment_N.numpy()
    if not bf16 and out_ND.dtype == torch.float32 and _streams(out_ND):
        rows = table_CW.numpy(), places, apart, segments, out_ND.numpy()
        split_rows(len(out_ND), lambda start, end: _gather_past_caches(*rows, start, end))
        return
    arrays = table_CW.numpy(), table_CW.view(torch.int16).numpy().view(np.uint16), bf16, places, apart, segments
    if out_ND.dtype == torch.bfloat16:
        out = out_ND.view(torch.int16).numpy().view(np.uint16)
        split_rows(len(out), lambda start, end: _gather_rounded(*arrays, out, start, end))
        return
    split_rows(len(out_ND), lambda start, end: _gather(*arrays, out_ND.numpy(), start, end))


def _streams(out_ND: Tensor) -> bool:
    return out_ND.nbytes >= _STREAMED and not (out_ND.data_ptr() | 4 * out_ND.shape[1]) % _LINE


# What is done for a lookup is written out: calls of functions with arrays would take longer than the copy.


@compiled
def _gather_past_caches(records, places, apart, segments, out, start, end):  # type: ignore[no-untyped-def]
    dim = out.shape[1]
    target = out.ctypes.data + start * out.strides[0]
    for lookup in range(start, end):
        if lookup + _AHEAD < end:
            ahead = places[segments[lookup + _AHEAD]]
            if ahead >= 0:
                ask(records, ahead, dim)
        place = places[segments[lookup]]
        if place >= 0:
            source = records.ctypes.data + place * records.strides[0]
        else:
            source = apart.ctypes.data + ~place * apart.strides[0]
        for offset in range(0, 4 * dim, _LINE):
            stream_line(target + offset, source + offset)
        target += out.strides[0]
    fence()


@compiled
def _gather(records, halves, bf16, places, apart, segments, out, start, end):  # type: ignore[no-untyped-def]
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
        elif bf16:
            bits = out[lookup].view(np.uint32)
            for column in range(dim):
                bits[column] = np.uint32(halves[place, column]) << 16
        else:
            for column in range(dim):
                out[lookup, column] = records[place, column]


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
