"""Tables of records for tests of kernels that work on them in their slots."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.kernels.record_tables import sparse_words

_SPARE = 5  # slots of other rows, which a kernel must leave alone


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float32 tensors are the same, to the sign of a zero."""
    return torch.equal(*(t.cpu().contiguous().view(torch.int32) for t in (a, b)))


def values_of_all_sizes(shape: torch.Size, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Of magnitudes from 2^low to 2^high, denormals among them."""
    exponents = torch.rand(shape, generator=generator) * (high - low) + low
    return torch.randn(shape, generator=generator) * 2**exponents


class Table:
    """Records of weights | state | version on the CPU, written the plain way."""

    def __init__(
        self, dim: int, state_size: int, bf16: bool = False, records: Tensor | None = None, *, bf16_state: bool = False
    ) -> None:
        self.dim, self.bf16, self.bf16_state = dim, bf16, bf16_state
        self._weight_words = (dim + 1) // 2 if bf16 else dim
        words = self._weight_words + (state_size // 2 if bf16_state else state_size) + 1
        self.records = torch.empty(0, words) if records is None else records

    def place(self, weights: Tensor, state: Tensor, versions: Tensor) -> Tensor:
        """Makes a table that holds these rows in some order, one of them in the last slot: their slots."""
        generator, count = torch.Generator().manual_seed(1), len(weights) + _SPARE
        self.records = torch.randn(count, self.records.shape[1], generator=generator)
        slots = torch.randperm(count - 1, generator=generator)[: len(weights)]
        slots[-1:] = count - 1
        self.fill(slots, weights, state, versions)
        return slots

    def fill(self, slots: Tensor, weights: Tensor, state: Tensor, versions: Tensor) -> None:
        """Stores rows; what is bf16 rounded to nearest, what is left of the weights' last word 0."""
        records = self.records[slots]
        if self.bf16:
            halves = torch.zeros(len(slots), 2 * self._weight_words, dtype=torch.bfloat16)
            halves[:, : self.dim] = weights.to(torch.bfloat16)
            records[:, : self._weight_words] = halves.view(torch.float32)
        else:
            records[:, : self.dim] = weights
        if self.bf16_state:
            state = state.to(torch.bfloat16).contiguous().view(torch.float32)
        records[:, self._weight_words : -1] = state
        records.view(torch.int32)[:, -1] = versions.to(torch.int32)
        self.records[slots] = records

    def weights(self, records: Tensor) -> Tensor:
        """A float32 copy of the weights."""
        words = records[:, : self._weight_words].contiguous()
        return words.view(torch.bfloat16)[:, : self.dim].float() if self.bf16 else words

    def state(self, records: Tensor) -> Tensor:
        """A float32 copy of the state."""
        words = records[:, self._weight_words : -1].contiguous()
        return words.view(torch.bfloat16).float() if self.bf16_state else words


def far_apart(offset: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two pieces of `count` floats in one memory, `offset` floats apart, of which the rest takes no memory on a CPU."""
    words = offset + count
    memory = torch.empty(words, device=device) if device.type == "cuda" else sparse_words(words)
    return memory[:count], memory[offset:]


def float_operations(ptx: str) -> list[str]:
    """The arithmetic on float32 in compiled code, each as often as it is written there."""
    return re.findall(r"\b(?:add|sub|mul|fma|mad|div|sqrt|rsqrt|rcp|ex2)\.[a-z.]*f32\b", ptx)


@contextlib.contextmanager
def without_waiting_or_allocating() -> Iterator[None]:
    """On a GPU: what happens within neither waits for the device nor takes memory from it."""
    taken = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == taken
