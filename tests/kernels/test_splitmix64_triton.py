import pytest
import torch
import triton
import triton.language as tl

from kernels.splitmix64 import counter_keys as torch_counter_keys
from kernels.splitmix64_triton import counter_keys


@triton.jit(do_not_specialize=["key"])
def keys_kernel(counters, out, key: tl.uint64, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(out + places, counter_keys(tl.load(counters + places), key).to(tl.int64))


@pytest.mark.parametrize("key", [0, 1, 7, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_the_words_of_the_reference(kernel_device, key):
    edges = [0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63)]
    random = torch.randint(-(2**63), 2**63 - 1, (57,), generator=torch.Generator().manual_seed(0))
    counters = torch.cat([torch.tensor(edges), random]).to(kernel_device)
    words = torch.empty_like(counters)
    keys_kernel[(1,)](counters, words, key, SIZE=64)
    assert torch.equal(words, torch_counter_keys(counters, key))


def test_columns_are_counted_in_32_bits(kernel_device):
    counters = torch.arange(-3, 5, dtype=torch.int32, device=kernel_device)
    words = torch.empty(8, dtype=torch.int64, device=kernel_device)
    keys_kernel[(1,)](counters, words, 0, SIZE=8)
    assert torch.equal(words, torch_counter_keys(counters.long()))
