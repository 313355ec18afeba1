import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.hash import HashSpec, hash_ngrams
from kernels.hash.reference import hash_ngrams_reference
from kernels.hash.triton import hash_ngrams_triton
from tests.grid import grid
from tests.kernels.hash.test_hash import PRIMES, cases, make_spec, positions_of, tokens_of
from tests.kernels.own_process import compile_launches
from tests.kernels.slow_hash import slow_rows

LARGEST = 2**63 - 1
SPARSE = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_batch(device, batch=3, length=150, vocabulary=2**17):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, vocabulary, (batch, length), generator=generator)
    starts = torch.rand(batch, length, generator=generator) < 0.1
    places = torch.arange(length)
    positions = places - torch.where(starts, places, 0).cummax(1).values
    return tokens.to(device), positions.to(device)


def stacked_spec(modules=2, orders=(2, 3), heads=4, **options):
    slots = len(orders) * heads
    primes = [[PRIMES[slot] + 2**33 * module for slot in range(slots)] for module in range(modules)]
    multipliers = [[2**45 - 2 * (7 * module + place) - 1 for place in range(orders[-1])] for module in range(modules)]
    return make_spec(multipliers, primes, orders, **options)


def assert_like_the_reference(tokens, positions, spec, compressed=None):
    rows = hash_ngrams_triton(tokens, positions, spec.to(tokens.device), compressed)
    expected = hash_ngrams_reference(tokens, positions, spec.to(tokens.device), compressed)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, expected)


@SPARSE
@given(case=cases())
def test_rows_equal_those_of_unbounded_integers(kernel_device, case):
    documents = case["documents"]
    spec = make_spec(*(case[key] for key in ("multipliers", "primes", "orders", "pad_id", "cross_documents")))
    tokens, positions = (part.to(kernel_device) for part in (tokens_of(documents), positions_of(documents)))
    assert hash_ngrams_triton(tokens, positions, spec.to(kernel_device)).tolist() == [slow_rows(**case)]


def near(number):
    """Integers beside a number, where an estimated quotient is wrong by one if it ever is."""
    return st.integers(-2, 2).map(lambda step: min(max(number + step, 0), LARGEST))


@st.composite
def divisions(draw):
    any_modulus = st.one_of(st.integers(1, LARGEST), st.integers(1, 2**34), st.integers(0, 62).map(lambda n: 2**n))
    modulus = max(1, draw(st.one_of(any_modulus, any_modulus.flatmap(near))))
    multiple = st.integers(0, LARGEST // modulus).map(lambda quotient: quotient * modulus)
    last_multiple = st.just(LARGEST // modulus * modulus)
    value = st.one_of(st.integers(0, LARGEST), near(LARGEST), multiple.flatmap(near), last_multiple.flatmap(near))
    return modulus, draw(value)


@SPARSE
@given(pairs=st.lists(divisions(), min_size=1, max_size=30))
def test_remainders_are_exact(kernel_device, pairs):
    """Every value below 2^63 by every modulus: with multiplier 1, the token id is what is divided."""
    moduli, values = (torch.tensor(part) for part in zip(*pairs, strict=True))
    spec = HashSpec(torch.tensor([1]), moduli, torch.zeros_like(moduli), (1,), pad_id=0)
    tokens = values[:, None].to(kernel_device)
    rows = hash_ngrams_triton(tokens, torch.zeros_like(tokens), spec.to(kernel_device))
    expected = [[value % modulus for modulus, _ in pairs] for _, value in pairs]
    assert rows[:, 0].tolist() == expected
    assert [word % 2**64 for word in spec.reciprocals_LS.tolist()] == [(2**64 - 1) // modulus for modulus, _ in pairs]


@pytest.mark.parametrize(
    ("form", "cross_documents"), grid([(2, (2, 3), 8), (3, (1, 2, 5), 3), (1, (1,), 1)], [True, False])
)
def test_modules_and_orders(kernel_device, form, cross_documents):
    modules, orders, heads = form
    primes = [PRIMES[: len(orders) * heads]] * modules
    multipliers = [[2**45 - 2 * (7 * module + place) - 1 for place in range(orders[-1])] for module in range(modules)]
    spec = make_spec(multipliers, primes, orders, pad_id=5, cross_documents=cross_documents)
    assert_like_the_reference(*random_batch(kernel_device), spec)


@pytest.mark.parametrize("batch", [(1, 1), (5, 1), (1, 2), (2, 64), (2, 65), (0, 5), (2, 0)])
def test_sizes(kernel_device, batch):
    assert_like_the_reference(*random_batch(kernel_device, *batch), stacked_spec())


def test_any_strides_and_integer_types(kernel_device):
    tokens, positions = random_batch(kernel_device, 4, 90, vocabulary=30000)
    spec = stacked_spec(pad_id=3)
    assert_like_the_reference(tokens[::2, ::3], positions[::2, ::3], spec)
    assert_like_the_reference(tokens[:, :9].T, positions[:, :9].T, spec)
    assert_like_the_reference(tokens, positions[:1].expand(4, -1), spec)
    assert_like_the_reference(tokens.to(torch.int16), positions.to(torch.int32), spec)


def test_rows_at_the_end_of_tables_beyond_32_bits(kernel_device):
    modulus = 2**35 + 53
    spec = make_spec([1], [[modulus, 1, 2**40]], (1,))
    tokens = torch.tensor([[modulus - 1, modulus, 2**62 + 1]], device=kernel_device)
    rows = hash_ngrams_triton(tokens, torch.zeros_like(tokens), spec.to(kernel_device))
    ends = [modulus - 1, modulus, modulus + 1 + (modulus - 1)]
    assert rows[0, 0, 0].tolist() == ends
    assert rows[0, 0, 1].tolist()[:2] == [0, modulus]


def test_the_strides_of_a_batch_beyond_31_bits(kernel_device):
    """Two sequences 2^31 elements apart, in memory that is only reserved."""
    tokens = torch.empty(2**31 + 64, dtype=torch.int8, device=kernel_device).as_strided((2, 40), (2**31, 1))
    values, positions = random_batch(kernel_device, 2, 40, vocabulary=100)
    tokens.copy_(values)
    assert_like_the_reference(tokens, positions, stacked_spec())


def test_compression_in_the_same_pass(kernel_device):
    tokens, positions = random_batch(kernel_device, vocabulary=1000)
    compressed = torch.randperm(1000, device=kernel_device) // 3
    spec = stacked_spec(pad_id=77)
    assert_like_the_reference(tokens, positions, spec, compressed)
    alone = hash_ngrams_triton(compressed[tokens], positions, spec.to(kernel_device))
    assert torch.equal(hash_ngrams_triton(tokens, positions, spec.to(kernel_device), compressed), alone)


def test_ids_outside_the_compression_read_nothing(kernel_device):
    compressed = torch.arange(10, device=kernel_device)
    spec = stacked_spec(pad_id=4).to(kernel_device)
    positions = torch.arange(4, device=kernel_device)[None]
    outside, pads = (torch.tensor([ids], device=kernel_device) for ids in ([1, 10, -1, 2**62], [1, 4, 4, 4]))
    rows = hash_ngrams_triton(outside, positions, spec, compressed)
    assert torch.equal(rows, hash_ngrams_triton(pads, positions, spec, compressed))


@pytest.mark.gpu
def test_public_function_on_a_gpu():
    tokens, positions = random_batch(torch.device("cuda"))
    spec = stacked_spec()
    rows = hash_ngrams(tokens, positions, spec.to("cuda"))
    assert torch.equal(rows.cpu(), hash_ngrams(tokens.cpu(), positions.cpu(), spec))


def launches():
    tokens, positions = random_batch("cpu", 4, 4096)
    spec = stacked_spec(heads=8)
    hash_ngrams_triton(tokens, positions, spec)
    hash_ngrams_triton(tokens.int()[:, :1], positions[:, :1], stacked_spec(1, (1, 3), 5), torch.arange(2**17))


def test_compiles_without_division_and_with_wide_stores():
    compiled = compile_launches(launches)
    assert [name for name, _ in compiled] == ["_hash_kernel"] * 2
    for _, code in compiled:
        assert "mul.hi.u64" in code
        assert not [
            line for line in code.splitlines() if line.strip().startswith(("rem.", "div.u64", "div.s64", "call"))
        ]
        assert ".local" not in code
    assert "st.global.v2.b64" in compiled[0][1]
