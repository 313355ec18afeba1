import json
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.addresses.compression import CompressedVocabulary, identity_vocabulary
from offload.addresses.hashing import AddressBook, choose_primes, draw_multipliers
from tests.kernels.slow_hash import slow_rows

# The released DeepSeek-V4.1 configuration: vocabulary 129,280 compressed to 99,092, modules in layers 1 and 14.
V41 = {"layers": [1, 14], "orders": [2, 3, 4], "heads": 8, "rows_per_head": 16_000_000, "seed": 0}
V41_VOCABULARY = identity_vocabulary(99_092, pad_id=2)


def is_prime(number):
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def slow_primes(num_modules, sizes, heads):
    """The released form's own words: per module and order, the next prime not yet seen, from the size upwards; one row
    where the size is 1."""
    seen, modules = set(), []
    for _ in range(num_modules):
        primes = []
        for size in sizes:
            candidate = size - 1
            for _ in range(heads):
                if size == 1:
                    primes.append(1)
                    continue
                candidate += 1
                while not is_prime(candidate) or candidate in seen:
                    candidate += 1
                seen.add(candidate)
                primes.append(candidate)
        modules.append(primes)
    return modules


def test_released_table_sizes_and_primes():
    book = AddressBook(V41_VOCABULARY, **V41)
    assert [book.num_rows(module) for module in range(book.num_modules)] == [384_006_168, 384_016_682]
    primes = book.fingerprint()["primes"]
    assert primes[0][:3] == [16000057, 16000079, 16000081]
    assert primes[1][-1] == 16000889
    assert book.all_rows(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)).shape[-1] == 24


def test_released_multipliers():
    assert draw_multipliers(1, 4, 99_092, 0) == [76632096046245, 4839876093313, 35959672319349, 73987337458391]
    assert draw_multipliers(14, 4, 99_092, 0) == [67716810739261, 51510806800915, 30921347202721, 82619226485591]


def test_paper_tables():
    # Engram-27B: 2 modules of 16 sub-tables of 2,262,400 rows, 80 columns: the 5.7B parameters of Table 1.
    book = AddressBook(V41_VOCABULARY, layers=[1, 14], orders=[2, 3], heads=8, rows_per_head=2_262_400)
    assert sum(book.num_rows(module) for module in range(2)) * 80 == pytest.approx(5.79e9, rel=1e-3)


@given(st.integers(0, 60), st.integers(1, 5), st.integers(1, 2**62), st.integers(0, 2**40))
def test_multipliers_are_odd_and_never_overflow(layer, count, vocabulary_size, seed):
    multipliers = draw_multipliers(layer, count, vocabulary_size, seed)
    assert len(multipliers) == count
    assert all(m % 2 == 1 and 0 < m < 2**63 and (vocabulary_size - 1) * m < 2**63 for m in multipliers)


@given(st.integers(1, 4), st.lists(st.integers(1, 400), min_size=1, max_size=3), st.integers(1, 5))
def test_primes_are_chosen_like_the_released_form_does(num_modules, sizes, heads):
    assert choose_primes(num_modules, sizes, heads) == slow_primes(num_modules, sizes, heads)


@st.composite
def batches(draw):
    """Sequences of equal length, each of several documents of raw token ids."""
    length = draw(st.integers(1, 12))
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, length), max_size=4)) | {0, length})
        tokens = draw(st.lists(st.integers(0, 39), min_size=length, max_size=length))
        sequences.append([tokens[start:end] for start, end in pairwise(cuts)])
    return sequences


@given(
    batches(),
    st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True),
    st.sets(st.integers(1, 6), min_size=1, max_size=3).map(sorted),
    st.integers(1, 4),
    st.integers(1, 60),
    st.booleans(),
)
def test_rows_equal_those_of_an_independent_implementation(
    sequences, layers, orders, heads, rows_per_head, cross_documents
):
    compressed = [token % 7 for token in range(40)]
    vocabulary = CompressedVocabulary(torch.tensor(compressed), 7, pad_id=3)
    book = AddressBook(
        vocabulary,
        layers=layers,
        orders=orders,
        heads=heads,
        rows_per_head=rows_per_head,
        cross_documents=cross_documents,
    )
    tokens = torch.tensor([list(chain.from_iterable(documents)) for documents in sequences])
    positions = torch.tensor([[p for d in documents for p in range(len(d))] for documents in sequences])
    every = book.all_rows(tokens, positions)
    for module, layer in enumerate(layers):
        rows = every[module]
        expected = [
            slow_rows(
                [[compressed[token] for token in document] for document in documents],
                multipliers=draw_multipliers(layer, orders[-1], 7, 0),
                primes=slow_primes(len(layers), [rows_per_head] * len(orders), heads)[module],
                orders=orders,
                pad_id=3,
                cross_documents=cross_documents,
            )
            for documents in sequences
        ]
        assert rows.tolist() == expected
        assert rows.min() >= 0
        assert rows.max() < book.num_rows(module)


def test_rows_of_the_released_tables_are_in_their_sub_tables():
    book = AddressBook(V41_VOCABULARY, **V41)
    tokens = torch.randint(0, 99_092, (2, 3000), generator=torch.Generator().manual_seed(0))
    tokens[0, :4] = 99_091  # the largest products
    rows = book.all_rows(tokens, torch.arange(3000).expand(2, 3000))[1]
    primes = torch.tensor(book.fingerprint()["primes"][1])
    starts = primes.cumsum(0) - primes
    assert ((rows >= starts) & (rows < starts + primes)).all()
    # Each sub-table is used evenly: 6,000 n-grams hardly ever meet among 16 million rows.
    assert all(rows[..., slot].unique().numel() > 5990 for slot in range(rows.shape[-1]))


def test_an_order_with_its_own_size():
    book = AddressBook(identity_vocabulary(10, pad_id=0), layers=[0], orders=[2, 3], heads=1, rows_per_head=[100, 10])
    assert book.fingerprint()["primes"] == [[101, 11]]
    assert book.num_rows(0) == 112


def test_tokens_outside_the_vocabulary_are_refused():
    book = AddressBook(identity_vocabulary(10, pad_id=0), layers=[0], orders=[2], heads=1, rows_per_head=10)
    with pytest.raises(ValueError, match="token id 10 is outside the vocabulary of 10 ids"):
        book.all_rows(torch.tensor([[10]]), torch.tensor([[0]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, "layers"),
        ({"layers": [1, 1]}, "layers"),
        ({"layers": [-1]}, "layers"),
        ({"orders": []}, "orders"),
        ({"orders": [3, 2]}, "orders"),
        ({"orders": [2, 2]}, "orders"),
        ({"orders": [0, 2]}, "orders"),
        ({"heads": 0}, "heads"),
        ({"rows_per_head": 0}, "rows_per_head"),
        ({"rows_per_head": [10]}, "rows_per_head"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=rf"model\.engram: {message}"):
        AddressBook(V41_VOCABULARY, **{**V41, **change})


def small_book(vocabulary=None, **change):
    numbers = {"layers": [1, 3], "orders": [2, 3], "heads": 2, "rows_per_head": 50, **change}
    return AddressBook(vocabulary or identity_vocabulary(100, pad_id=0), **numbers)


def saved_and_loaded(book):
    return json.loads(json.dumps(book.fingerprint()))


def test_fingerprint_survives_json():
    assert saved_and_loaded(small_book()) == small_book().fingerprint()


SAME_SIZE = CompressedVocabulary(torch.arange(100).roll(1), 100, 0)


@pytest.mark.parametrize(
    ("book", "key"),
    [
        (lambda: small_book(identity_vocabulary(99, pad_id=0)), "compressed_vocabulary"),
        (lambda: small_book(SAME_SIZE), "compression_sha256"),
        (lambda: small_book(identity_vocabulary(100, pad_id=1)), "pad_id"),
        (lambda: small_book(seed=5), "seed"),
        (lambda: small_book(layers=[1, 2]), "layers"),
        (lambda: small_book(layers=[1]), "layers"),
        (lambda: small_book(orders=[2, 4]), "orders"),
        (lambda: small_book(heads=3), "heads"),
        (lambda: small_book(rows_per_head=51), "rows_per_head"),
        (lambda: small_book(cross_documents=True), "cross_documents"),
    ],
)
def test_whatever_changes_an_address_changes_the_fingerprint(book, key):
    before, now = saved_and_loaded(small_book()), book().fingerprint()
    assert key in {name for name in before if before[name] != now[name]}


def test_the_fingerprint_holds_what_numpys_generator_and_the_primes_gave():
    fingerprint = small_book().fingerprint()
    assert fingerprint["multipliers"][0] == draw_multipliers(1, 3, 100, seed=0)
    assert fingerprint["primes"][0][0] == 53


def test_a_fingerprint_cannot_be_changed_from_outside():
    book = small_book()
    book.fingerprint()["primes"][0][0] = 4
    assert book.fingerprint()["primes"][0][0] == 53
