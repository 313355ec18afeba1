import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.hash import HashSpec, hash_ngrams
from tests.kernels.slow_hash import slow_rows

PRIMES = [101, 103, 107, 109, 113, 127, 131, 137, 139, 149, 151, 157, 163, 167, 173, 179]


def make_spec(multipliers, primes, orders, pad_id=0, cross_documents=False):
    moduli = torch.tensor(primes)
    return HashSpec(
        torch.tensor(multipliers), moduli, moduli.cumsum(-1) - moduli, tuple(orders), pad_id, cross_documents
    )


def positions_of(documents):
    return torch.tensor([[place for document in documents for place in range(len(document))]])


def tokens_of(documents):
    return torch.tensor([[token for document in documents for token in document]])


@st.composite
def cases(draw):
    vocabulary = draw(st.integers(1, 2**40))
    token = st.integers(0, vocabulary - 1)
    orders = sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=4)))
    bound = (2**63 - 1) // vocabulary
    return {
        "documents": draw(st.lists(st.lists(token, min_size=1, max_size=7), min_size=1, max_size=4)),
        "multipliers": draw(st.lists(st.integers(1, bound), min_size=orders[-1], max_size=orders[-1])),
        "primes": draw(st.permutations(PRIMES))[: len(orders) * draw(st.integers(1, 4))],
        "orders": orders,
        "pad_id": draw(token),
        "cross_documents": draw(st.booleans()),
    }


@given(cases())
def test_rows_equal_those_of_unbounded_integers(case):
    documents = case["documents"]
    spec = make_spec(*(case[key] for key in ("multipliers", "primes", "orders", "pad_id", "cross_documents")))
    rows = hash_ngrams(tokens_of(documents), positions_of(documents), spec)
    assert rows.tolist() == [slow_rows(**case)]


def test_products_at_the_limit_of_int64_do_not_wrap():
    documents = [[1, 1, 1]]
    multipliers = [2**63 - 1, 2**62 + 1, 2**63 - 25]
    rows = hash_ngrams(tokens_of(documents), positions_of(documents), make_spec(multipliers, [16000057], [3]))
    assert rows.tolist() == [slow_rows(documents, multipliers=multipliers, primes=[16000057], orders=[3], pad_id=0)]


def test_a_blocked_look_back_blocks_all_longer_ones():
    spec = make_spec([3, 5, 7, 11], [10007], [4], pad_id=9)
    before = hash_ngrams(torch.tensor([[1, 2, 3, 4, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1, 2]]), spec)
    other = hash_ngrams(torch.tensor([[8, 8, 8, 4, 5, 6]]), torch.tensor([[0, 1, 2, 0, 1, 2]]), spec)
    assert torch.equal(before[:, 3:], other[:, 3:])
    assert before[0, 3, 0] == (4 * 3) ^ (9 * 5) ^ (9 * 7) ^ (9 * 11)
    assert before[0, 5, 0] == (6 * 3) ^ (5 * 5) ^ (4 * 7) ^ (9 * 11)


def test_crossing_documents_stops_at_the_sequence():
    spec = make_spec([3, 5], [10007], [2], pad_id=9, cross_documents=True)
    rows = hash_ngrams(torch.tensor([[1, 2], [4, 6]]), torch.tensor([[0, 0], [0, 1]]), spec)
    assert rows.flatten().tolist() == [3 ^ 45, 6 ^ 5, 12 ^ 45, 18 ^ 20]


def test_stacked_modules_hash_like_each_alone():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (3, 11), generator=generator)
    positions = torch.arange(11).expand(3, 11)
    multipliers, primes = [[3, 50021, 7], [11, 13, 900007]], [PRIMES[:6], PRIMES[6:12]]
    stacked = hash_ngrams(tokens, positions, make_spec(multipliers, primes, [2, 3]))
    assert stacked.shape == (2, 3, 11, 6)
    for module in range(2):
        alone = hash_ngrams(tokens, positions, make_spec(multipliers[module], primes[module], [2, 3]))
        assert torch.equal(stacked[module], alone)


def test_narrow_token_types_hash_like_int64():
    tokens, positions = torch.tensor([[30000, 31000, 32000]]), torch.tensor([[0, 1, 2]])
    spec = make_spec([2**47 + 1, 2**46 + 5], PRIMES[:2], [1, 2])
    narrow = hash_ngrams(tokens.to(torch.int16), positions.to(torch.int16), spec)
    assert torch.equal(narrow, hash_ngrams(tokens, positions, spec))


def test_empty_batch():
    spec = make_spec([3, 5], PRIMES[:4], [1, 2])
    assert hash_ngrams(torch.empty(0, 5, dtype=torch.int64), torch.empty(0, 5, dtype=torch.int64), spec).shape == (
        0,
        5,
        4,
    )
    assert hash_ngrams(torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0, dtype=torch.int64), spec).shape == (
        2,
        0,
        4,
    )
