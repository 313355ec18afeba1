import json
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data.text import document, numbered_store, small_tokenizer, write_pair
from train.data.batches.loader import IGNORED, Loader
from train.data.batches.packing import pack
from train.data.stores.store import TokenStore
from train.errors import UserError

TOKENIZER = small_tokenizer()
LENGTHS = [5, 17, 0, 1, 40, 8, 3, 29, 64, 2, 11, 33] * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return numbered_store(tmp_path_factory.mktemp("store"), LENGTHS, TOKENIZER)


def loader(store, split="train", **changes):
    sizes = {"sequence_length": 8, "global_batch_size": 8, "micro_batch_size": 2, "seed": 3, "validation_fraction": 0.2}
    return Loader(store, split=split, **(sizes | changes))


def rows(batches):
    return torch.cat([torch.stack([b.tokens_BT, b.labels_BT, b.positions_BT]) for b in batches], dim=1)


def global_batch(store, step, world_size, **changes):
    ranks = [loader(store, rank=rank, world_size=world_size, **changes).batch(step) for rank in range(world_size)]
    return torch.cat([rows(batches) for batches in ranks], dim=1)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_global_batches_are_the_same_at_any_number_of_ranks(store, split):
    steps = loader(store, split).steps_per_epoch
    for step in (0, 1, steps - 1, steps, 3 * steps + 1):
        one = global_batch(store, step, 1, split=split)
        for world_size in (2, 4):
            assert torch.equal(one, global_batch(store, step, world_size, split=split))
        assert torch.equal(one, global_batch(store, step, 2, split=split, micro_batch_size=4))


def test_every_token_of_an_epoch_once_but_for_the_dropped_tail(store):
    train = loader(store)
    mask = np.repeat(train.lines.reader(0, 8).held_out, np.diff(store.document_offsets))
    expected = np.bincount(store.tokens[~mask], minlength=300)
    for epoch in range(3):
        seen = np.zeros(300, dtype=np.int64)
        for step in range(epoch * train.steps_per_epoch, (epoch + 1) * train.steps_per_epoch):
            for batch in train.batch(step):
                seen += np.bincount(batch.tokens_BT.flatten(), minlength=300)
        assert (seen <= expected).all()
        assert train.num_tokens - seen.sum() < 8 + 8 * 8


def test_no_sequence_comes_twice_in_an_epoch_nor_next_to_the_one_before_it(tmp_path):
    # Every token of the corpus has another id, so that a sequence is known by its first token.
    store = TokenStore.open(
        write_pair(tmp_path / "a", [range(i, i + 29) for i in range(0, 60_000, 29)], 65_000),
        tokenizer=TOKENIZER,
    )
    store.vocab_size = 65_000
    train = loader(store, global_batch_size=64, micro_batch_size=64)
    first = torch.cat([train.batch(step)[0].tokens_BT[:, 0] for step in range(train.steps_per_epoch)])
    assert len(first.unique()) == len(first) == train.steps_per_epoch * 64
    # Parts of a document, which follow one another in the packed stream, are spread over the epoch.
    assert (first.diff() == train.sequence_length).float().mean() < 0.01


def test_validation_covers_every_token_once_whatever_the_batch(store):
    held_out = [document(store, i) for i in np.flatnonzero(loader(store).lines.reader(0, 8).held_out)]
    expected = np.bincount(np.concatenate([ids[1:] for ids in held_out if len(ids)]), minlength=300)
    for changes in ({}, {"global_batch_size": 32}, {"sequence_length": 16, "global_batch_size": 2}, {"seed": 9}):
        validation = loader(store, "validation", **changes)
        labels = torch.cat([b.labels_BT for i in range(validation.steps_per_epoch) for b in validation.batch(i)])
        np.testing.assert_array_equal(np.bincount(labels[labels != IGNORED], minlength=300), expected)
    assert torch.equal(
        global_batch(store, 0, 1, split="validation"), global_batch(store, 0, 1, split="validation", seed=9)
    )


def test_no_document_is_on_both_sides(store):
    train, validation = loader(store), loader(store, "validation")
    assert train.num_documents + validation.num_documents == sum(length > 0 for length in LENGTHS)
    assert not set(train.lines.reader(0, 8).documents) & set(validation.lines.reader(0, 8).documents)
    assert validation.num_documents > 0


def test_order_depends_on_seed_and_step_and_on_nothing_else(store):
    train = loader(store)
    forward = [rows(train.batch(step)) for step in range(2 * train.steps_per_epoch)]
    for step in reversed(range(len(forward))):
        assert torch.equal(rows(loader(store).batch(step)), forward[step])
    distinct = {batch.numpy().tobytes() for batch in forward}
    assert len(distinct) == len(forward)
    assert not torch.equal(forward[0], rows(loader(store, seed=4).batch(0)))


@settings(max_examples=60)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**63 - 1), length=st.integers(2, 30))
def test_labels_and_positions_follow_from_the_tokens(store, step, seed, length):
    (batch,) = loader(store, seed=seed, sequence_length=length, micro_batch_size=4, global_batch_size=4).batch(step)
    tokens, labels, positions = batch.tokens_BT, batch.labels_BT, batch.positions_BT
    starts = positions == 0
    assert starts[:, 0].all()
    assert torch.equal(positions[:, 1:][~starts[:, 1:]], (positions[:, :-1] + 1)[~starts[:, 1:]])
    # Inside a document the label is the next token; before the start of another one there is none.
    inside = ~starts[:, 1:]
    assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
    assert (labels[:, :-1][~inside] == IGNORED).all()
    assert (tokens[:, :-1][~inside] == TOKENIZER.eos_id).all()
    assert (labels[tokens == TOKENIZER.eos_id] == IGNORED).all()
    assert {tokens.dtype, labels.dtype, positions.dtype} == {torch.int64}


def test_threads_get_what_one_thread_gets(store):
    train = loader(store)
    steps = list(range(6 * train.steps_per_epoch))
    expected = [rows(loader(store).batch(step)) for step in steps]
    results = {}

    def work(number, order):
        for step in order:
            results[(number, step)] = rows(train.batch(step))

    threads = [threading.Thread(target=work, args=job) for job in enumerate((steps, steps[::-1], steps[3:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3 * len(steps) - 3
    assert all(torch.equal(batch, expected[step]) for (_, step), batch in results.items())


def test_batches_do_not_share_memory(store):
    train = loader(store)
    first, again = train.batch(0), train.batch(0)
    first[0].tokens_BT.zero_()
    assert not torch.equal(first[0].tokens_BT, again[0].tokens_BT)
    assert torch.equal(rows(train.batch(0)), rows(again))


def test_a_batch_is_made_in_milliseconds(tmp_path):
    generator = np.random.default_rng(0)
    documents = [generator.integers(2, 300, generator.integers(1, 2000)) for _ in range(2000)]
    store = TokenStore.open(write_pair(tmp_path / "a", documents), tokenizer=TOKENIZER)
    train = loader(store, sequence_length=256, global_batch_size=16, micro_batch_size=16)
    train.batch(0)
    times = []
    for step in range(20):
        start = time.perf_counter()
        train.batch(step)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3


def test_too_little_text_is_told_with_the_numbers(store):
    with pytest.raises(UserError, match=r"\d+ tokens in \d+ document.*sequences of 512; one step takes 8"):
        loader(store, sequence_length=512)


def test_there_may_be_nothing_to_validate_on(store):
    validation = loader(store, "validation", validation_fraction=0)
    assert (validation.num_documents, validation.steps_per_epoch) == (0, 0)
    assert loader(store, validation_fraction=0).num_documents == loader(store).num_documents + loader(
        store, "validation").num_documents  # fmt: skip


def test_one_document_trains_without_validation(tmp_path):
    store = TokenStore.open(write_pair(tmp_path / "a", [[*range(2, 202), 0]]), tokenizer=TOKENIZER)
    assert loader(store).num_documents == 1
    assert loader(store, "validation").num_documents == 0


def test_sizes_that_do_not_divide_are_refused(store):
    with pytest.raises(UserError, match=r"train\.global_batch_size: 8 sequences cannot be split over 3 rank"):
        loader(store, world_size=3)
    with pytest.raises(UserError, match="micro-batches of 3"):
        loader(store, micro_batch_size=3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        loader(store, rank=2, world_size=2)
    with pytest.raises(ValueError, match="negative"):
        loader(store).batch(-1)


def test_tokens_that_the_tokenizer_lacks_are_told(tmp_path):
    store = TokenStore.open(write_pair(tmp_path / "a", [[5, 4000, 0]] * 99), tokenizer=TOKENIZER)
    with pytest.raises(UserError, match="token id 4000 is not in the tokenizer's 300 entries"):
        loader(store).batch(0)


def test_unigram_entropy_is_that_of_predicted_tokens(tmp_path):
    store = TokenStore.open(write_pair(tmp_path / "a", [[7, *[5] * 8, 0]] * 100), tokenizer=TOKENIZER)
    train, validation = loader(store), loader(store, "validation")
    n = train.num_documents
    log_p = {count: np.log((count * n + 1) / (9 * n + 300)) for count in (8, 1)}
    assert validation.unigram_entropy() == pytest.approx(-(8 * log_p[8] + log_p[1]) / 9)
    assert validation.unigram_entropy() == train.unigram_entropy()
    parts = [part for step in range(validation.steps_per_epoch) for part in validation.batch(step)]
    assert train.unigram_entropy(torch.cat([part.labels_BT for part in parts])) == pytest.approx(
        train.unigram_entropy()
    )


def test_bytes_of_tensors_and_arrays(store):
    ids = torch.tensor([[*TOKENIZER.encode("the fox"), IGNORED]])
    assert loader(store).bytes_of(ids) == loader(store).bytes_of(ids.numpy()) == 7


def test_identity_tells_what_changes_the_batches(store):
    base = loader(store)
    assert json.loads(json.dumps(base.identity())) == base.identity()
    assert base.identity() == loader(store, rank=1, world_size=2, micro_batch_size=4).identity()
    for change in (
        {"seed": 4},
        {"sequence_length": 9},
        {"global_batch_size": 4},
        {"validation_fraction": 0.3},
        {"shuffle_window": 9},
    ):
        assert loader(store, **change).identity() != base.identity()


def test_batches_passed_over_leave_the_order_of_the_others(store):
    plain, passing = loader(store), loader(store, skip=[range(1, 3), range(4, 5)])
    wanted = [0, 3, 5, 6, 7]
    assert [passing.batch_number(step) for step in range(5)] == wanted
    for step, number in enumerate(wanted):
        assert torch.equal(rows(passing.batch(step)), rows(plain.batch(number)))
        assert passing.where(step) == plain.where(number)


def test_batches_passed_over_are_other_data(store):
    assert "skip_steps" not in loader(store).identity(), "checkpoints of before would be refused"
    assert loader(store, skip=[range(1, 3)]).identity()["skip_steps"] == [[2, 3]]


def test_where_a_batch_is_names_the_sequences_of_all_ranks(store):
    train = loader(store, rank=1, world_size=2)
    step = train.steps_per_epoch + 1
    found = train.where(step)
    assert (found["batch"], found["epoch"]) == (step + 1, 1)
    order = train.lines.reader(0, 8).epoch(1)
    packed = pack(
        store.tokens, order.stream.pieces(np.array(found["sequences"]), 8), len(found["sequences"]), 8, store.pad_id
    )
    assert np.array_equal(packed.tokens_BT, global_batch(store, step, 2)[0].numpy())
