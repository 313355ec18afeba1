"""Batches of several sources, and phases."""

import json
import re

import numpy as np
import pytest
import torch

from tests.train.data.text import small_tokenizer, write_pair
from train.data.batches.course import Phase, Seen
from train.data.batches.loader import Loader
from train.data.batches.reader import Source
from train.data.blend import Blend
from train.data.config import DataConfig
from train.data.phases import begun_at, spans
from train.data.preparation.prepare import prepare
from train.data.stores.store import TokenStore
from train.errors import UserError

TOKENIZER = small_tokenizer()
BATCH = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two stores whose tokens tell which they are of, and a small one: every token of `high` is above 150."""
    folder = tmp_path_factory.mktemp("stores")
    lengths = [5, 17, 40, 8, 3, 29, 64, 2, 11, 33]
    stores = {
        "low": [[2 + (i * 7 + j) % 140 for j in range(n)] for i, n in enumerate(lengths * 6)],
        "high": [[151 + (i * 5 + j) % 140 for j in range(n)] for i, n in enumerate(lengths * 3)],
        "few": [[145 + j % 5 for j in range(n)] for n in (20, 31, 10)],
    }
    opened = {}
    for name, documents in stores.items():
        prefix = write_pair(folder / name, [[*body, TOKENIZER.eos_id] for body in documents])
        opened[name] = Source(name, TokenStore.open(prefix, tokenizer=TOKENIZER), 4.0)
    return opened


def loader(sources, *phases, **changes):
    sizes = {"sequence_length": 8, "global_batch_size": BATCH, "micro_batch_size": 2, "seed": 3}
    used = [sources[name] for name in ("low", "high", "few")][: len(phases[0].weights)]
    return Loader(used, split="train", validation_fraction=0.2, phases=phases, **(sizes | changes))


def rows(batches):
    parts = [torch.stack([b.tokens_BT, b.labels_BT, b.positions_BT]) for b in batches]
    return torch.cat(parts, dim=1)


MIXED = Phase(0, 8, (0.7, 0.3))
PHASES = (MIXED, Phase(13, 8, (0.2, 0.8)), Phase(20, 16, (0.5, 0.5)))


def test_one_source_gives_the_batches_that_it_gives_without_a_mixture(sources):
    alone = loader(sources, Phase(0, 8, (5.0,)))
    plain = Loader(sources["low"].store, split="train", sequence_length=8, global_batch_size=BATCH, micro_batch_size=2,
                   seed=3, validation_fraction=0.2)  # fmt: skip
    for step in (0, 1, 40, 500):
        assert torch.equal(rows(alone.batch(step)), rows(plain.batch(step)))
        assert alone.where(step) == plain.where(step)
    assert alone.identity() == plain.identity()
    assert "mix" not in plain.identity(), "checkpoints of before would be refused"


def test_a_batch_has_its_sources_sequences_in_the_order_in_which_each_is_read(sources):
    mixed = loader(sources, MIXED)
    alone = [mixed.lines.reader(source, 8) for source in range(2)]
    read = [0, 0]
    for step in range(60):
        for batch in mixed.batch(step):
            for tokens, source in zip(batch.tokens_BT, batch.sources_B.tolist(), strict=True):
                words = tokens[tokens != TOKENIZER.eos_id]
                assert (words > 150).all() if source else (words < 145).all()
                assert np.array_equal(tokens, alone[source].pack(np.array([read[source]])).tokens_BT[0])
                read[source] += 1
    assert [seen.tokens for seen in mixed.seen(60).values()] == [8 * count for count in read]
    assert read == [336, 144]


@pytest.mark.parametrize("step", [0, 12, 13, 19, 20, 33])
def test_global_batches_of_all_phases_are_the_same_at_any_number_of_ranks(sources, step):
    one = rows(loader(sources, *PHASES).batch(step))
    assert one.shape[2] == (16 if step >= 20 else 8)
    for world_size in (2, 4):
        parts = [loader(sources, *PHASES, rank=rank, world_size=world_size).batch(step) for rank in range(world_size)]
        assert torch.equal(torch.cat([rows(part) for part in parts], dim=1), one)


def test_a_phase_goes_on_in_each_source_where_the_one_before_left_off(sources):
    phased = loader(sources, *PHASES)
    lines = [np.concatenate([line[source == s] for source, line in located(phased, 0, 20)]) for s in range(2)]
    for line in lines:
        assert np.array_equal(line, np.arange(len(line)))
    # Other sequences: the next epoch.
    (source_B, line_B), *_ = located(phased, 20, 21)
    for source, length in enumerate(map(len, lines)):
        before, after = (phased.lines.reader(source, tokens).sequences for tokens in (8, 16))
        assert line_B[source_B == source][0] == -(-length // before) * after
    tokens = [8 * len(line) + 16 * 4 * 5 for line in lines]
    assert [seen.tokens for seen in phased.seen(25).values()] == tokens


def located(loader, first, end):
    return [loader.course.locate(number, slice(0, BATCH)) for number in range(first, end)]


def test_batches_passed_over_do_not_move_the_phases(sources):
    plain, passing = loader(sources, *PHASES), loader(sources, *PHASES, skip=[range(5, 9)])
    assert torch.equal(rows(passing.batch(9)), rows(plain.batch(13)))
    assert plain.phase_starts(30) == [0, 13, 20]
    assert passing.phase_starts(30) == [0, 9, 16]
    assert passing.phase_starts(10) == [0, 9]
    assert passing.seen(9) == plain.seen(13)


def test_a_source_may_be_smaller_than_a_batch_and_repeats(sources):
    mixed = loader(sources, Phase(0, 8, (0.5, 0.4, 0.1)))
    assert mixed.lines.reader(2, 8).sequences < BATCH
    few = mixed.seen(200)["few"]
    assert few == Seen(8 * 160, 160 / mixed.lines.reader(2, 8).sequences)
    found = mixed.where(3)
    assert len(found["sources"]) == len(found["epochs"]) == len(found["sequences"]) == BATCH


def test_a_source_without_a_sequence_is_refused_by_its_name(sources):
    with pytest.raises(UserError, match=r"too little text in few: .* sequences of 200; it takes one"):
        loader(sources, Phase(0, 8, (0.5, 0.5, 0.0)), Phase(3, 200, (0.5, 0.5, 0.5)))


def test_the_identity_has_mixtures_and_phases(sources):
    base = loader(sources, *PHASES).identity()
    assert json.loads(json.dumps(base)) == base
    assert base["mix"] == [[sources["low"].store.fingerprint, 7], [sources["high"].store.fingerprint, 3]]
    assert base == loader(sources, MIXED._replace(weights=(70, 30)), *PHASES[1:], rank=1, world_size=2).identity()
    for phases in ((MIXED,), PHASES[:2], (MIXED._replace(weights=(0.3, 0.7)), *PHASES[1:])):
        assert loader(sources, *phases).identity() != base


def test_entropy_is_priced_with_the_frequencies_of_the_mixture(sources):
    labels = torch.tensor([3, 3, 200])
    mixed = loader(sources, MIXED).unigram_entropy(labels)
    probability = np.zeros(300)
    for share, name in ((0.7, "low"), (0.3, "high")):
        only = loader(sources | {"low": sources[name]}, Phase(0, 8, (1.0,)))
        probability += share * np.exp([-only.unigram_entropy(torch.tensor([token])) for token in range(300)])
    assert mixed == pytest.approx(-np.log(probability[[3, 3, 200]]).mean())


def test_phases_begin_after_steps_or_tokens():
    phases = [{"after_tokens": 1000, "sequence_length": 16}, {"after_tokens": 2100}, {"after_steps": 40}]
    later = [{"sequence_length": 4}, {"sequence_length": 2}]
    data = {"path": "x", "sequence_length": 8, "phases": [phases[0], phases[1] | later[0], phases[2] | later[1]]}
    config = DataConfig.model_validate(data)
    # 16 batches of 64 tokens are 1,024; 9 of 128 make 2,176.
    assert [begin[:2] for begin in begun_at(config, 8)] == [(0, 8), (16, 16), (25, 4), (40, 2)]
    assert list(spans(config, 8, 30)) == [(16, 8), (9, 16), (5, 4)]
    assert list(spans(config, 8, 10)) == [(10, 8)]
    config = DataConfig.model_validate(data | {"phases": [phases[2] | later[0], phases[0] | later[1]]})
    with pytest.raises(
        ValueError, match=r"phase 3 begins no later than the one before it, .* step 41, after 2,560 tokens"
    ):
        begun_at(config, 8)


def test_a_job_opens_its_sources_once_and_refuses_another_tokenizer(tmp_path):
    for name, animal in {"a": "fox", "b": "cat", "d": "fox"}.items():
        (tmp_path / f"{name}.txt").write_text(f"the {animal} jumps over the lazy dog\n" * 400)
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, tokenizer=TOKENIZER, progress=False)
    prepare([tmp_path / "a.txt"], tmp_path / "c", train_bpe=270, progress=False)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    phase = {"after_steps": 5, "mix": [{"path": b, "tokens": 30}, {"path": a, "tokens": 10}]}
    blend = Blend.open(DataConfig.model_validate({"path": a, "phases": [phase]}), 8)
    assert [source.name for source in blend.sources] == ["a", "b"]
    assert [phase.weights for phase in blend.phases] == [(1.0, 0.0), (10.0, 30.0)]
    with pytest.raises(UserError, match=re.escape(f"{c} was prepared with another tokenizer than {a}; prepare it")):
        Blend.open(DataConfig.model_validate({"mix": f"1 {a} 1 {c}"}), 8)
    with pytest.raises(UserError, match=re.escape(f"data.mix: {a} and {d} hold the same text, whose sequences would")):
        Blend.open(DataConfig.model_validate({"mix": f"1 {a} 1 {b} 1 {d}"}), 8)
