"""Generation: the logits of training's forward, on-demand rows, and how tokens are drawn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from train.errors import UserError
from train.use.generation import Decoder, TextBatch, continuation, draw
from train.use.saved_run import SavedRun
from train.use.together import Asked, continue_together

TEXT = 'def main(argv):\n    """Returns it."""\n'


@pytest.fixture(scope="module")
def saved(trained: Path) -> SavedRun:
    return SavedRun.open(trained)


@torch.no_grad()
def forward(saved: SavedRun, ids: list[int]) -> Tensor:
    """Training's forward over a text: logits [T, V]."""
    tokens_BT, positions_BT = torch.tensor([ids]), torch.arange(len(ids))[None]
    return saved.model()(tokens_BT, positions_BT, saved.tables().look_up(tokens_BT, positions_BT))[0]


@pytest.mark.parametrize("prompt", [1, 2, 3, 11])
def test_token_by_token_gives_the_logits_of_trainings_forward(prompt: int, saved: SavedRun) -> None:
    ids = saved.tokenizer.encode(TEXT)[:28]
    wanted, model, tables = forward(saved, ids), saved.model(), saved.tables()
    slots = 2 * saved.job.model.engram.lookups_per_token
    with Decoder(model, tables, max_length=32) as decoder:
        found = [decoder.append(ids[:prompt])]
        for token in ids[prompt:]:
            before = tables.rows_read
            found.append(decoder.append([token]))
            assert tables.rows_read - before <= slots, "more rows were read than the new token's"
    torch.testing.assert_close(torch.stack(found), wanted[prompt - 1 :], rtol=1e-5, atol=1e-5)


def test_the_context_of_a_text_that_grows_too_long(saved: SavedRun) -> None:
    ids = saved.tokenizer.encode(TEXT * 2)[:25]
    with Decoder(saved.model(), saved.tables(), max_length=20) as decoder:
        first = decoder.append(ids[:22])
        second = decoder.append(ids[22:23])
        third = decoder.append(ids[23:24])
    for found, context in ((first, ids[2:22]), (second, ids[13:23]), (third, ids[13:24])):
        torch.testing.assert_close(found, forward(saved, context)[-1], rtol=1e-5, atol=1e-5)


def test_texts_side_by_side_have_the_logits_of_each_alone(saved: SavedRun) -> None:
    ids, lengths = saved.tokenizer.encode(TEXT)[:20], [3, 12, 7, 1]
    wanted = forward(saved, ids)
    with TextBatch(saved.model(), saved.tables(), saved.tokenizer.pad_id) as texts:
        for more in range(4):
            if more == 2:
                texts.keep([1, 3])
                lengths = [12, 1]
            found = texts.append([[ids[length + more - 1]] if more else ids[:length] for length in lengths])
            expected = torch.stack([wanted[length + more - 1] for length in lengths])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_texts_that_grow_together_are_each_as_if_alone(saved: SavedRun) -> None:
    ids, tables = saved.tokenizer.encode(TEXT)[:20], saved.tables()
    asked = [Asked(ids[:count], num_tokens=8, temperature=0, generator=torch.Generator()) for count in (3, 12, 7, 1)]
    asked[2].ends = lambda found: len(found) == 4
    calls, look_up, ended = [], tables.look_up, []

    def counted(tokens_BT: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(len(tokens_BT))
        return look_up(tokens_BT, *rest, **options)

    tables.look_up = counted
    model = saved.model()
    settings = {"vocab_size": saved.tokenizer.vocab_size, "eos_id": saved.tokenizer.eos_id, "done": ended.append}
    continue_together(lambda: TextBatch(model, tables, saved.tokenizer.pad_id), asked, **settings, batch_tokens=100)
    assert calls == [4, 4, 4, 4, 3, 3, 3, 3], "rows are looked up once a step, for all texts"
    assert sum(ended) == 4
    for each, count in zip(asked, (8, 8, 4, 8), strict=True):
        assert each.found == continued(saved, each.prompt, seed=0, num_tokens=count, temperature=0, top_k=None)
    calls.clear()
    for each in asked:
        each.found = []
    continue_together(lambda: TextBatch(model, tables, 0), asked, **settings, batch_tokens=40)
    assert calls == [2] * 4 + [1] * 4 + [2] * 8, "a batch has at most so many tokens"


def continued(saved: SavedRun, prompt: list[int], *, seed: int, **choices: Any) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    with Decoder(saved.model(), saved.tables(), saved.job.data.sequence_length) as decoder:
        return list(continuation(decoder, saved.tokenizer, prompt, generator=generator, **choices))


def test_greedy_continuation_follows_the_forward(saved: SavedRun) -> None:
    prompt = saved.tokenizer.encode("import ")
    found = continued(saved, prompt, num_tokens=6, temperature=0, top_k=None, seed=0)
    ids = list(prompt)
    for token in found:
        logits_V = forward(saved, ids)[-1]
        assert logits_V[token] >= logits_V.max() - 1e-4
        ids.append(token)
    assert len(found) == 6 or logits_V.argmax() == saved.tokenizer.eos_id
    others = [token + 1 for token in found[:2]]  # of a rank that rounds otherwise
    told = iter(others)
    choices: dict[str, Any] = {"num_tokens": 2, "temperature": 0, "top_k": None}
    assert continued(saved, prompt, seed=0, **choices, agreed=lambda _: next(told)) == others
    padded: Any = SimpleNamespace(vocab_size=9, eos_id=-1)  # the model has more tokens than the tokenizer
    with Decoder(saved.model(), saved.tables(), 32) as decoder:
        few = list(continuation(decoder, padded, prompt, generator=torch.Generator(), **choices))
    assert max(few) < 9 <= max(found)


def test_a_seed_decides_the_text(saved: SavedRun) -> None:
    def text(seed: int) -> list[int]:
        return continued(saved, [], num_tokens=12, temperature=1.0, top_k=50, seed=seed)

    assert text(1) == text(1) != text(2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_told_and_not_drawn_from(saved: SavedRun, wrong: float) -> None:
    model = saved.model()
    model.model.norm.weight.fill_(wrong)
    with Decoder(model, saved.tables(), 32) as decoder:
        drawn = continuation(
            decoder, saved.tokenizer, [5], num_tokens=2, temperature=1.0, top_k=None, generator=torch.Generator()
        )
        with pytest.raises(UserError, match="logits are not finite"):
            list(drawn)


def test_no_temperature_is_too_low_to_draw_at() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0])
    assert [draw(logits_V, 1e-45, top_k, torch.Generator()) for top_k in (None, 2)] == [1, 1]


def test_draws_are_of_the_likeliest_at_the_temperature() -> None:
    logits_V = torch.tensor([1.0, 3.0, 2.0, -1.0])
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int | None, top_p: float = 1.0) -> Tensor:
        draws = torch.tensor([draw(logits_V, temperature, top_k, generator, top_p) for _ in range(2400)])
        return torch.bincount(draws, minlength=4) / len(draws)

    assert shares(0, None).tolist() == [0, 1, 0, 0]
    assert shares(1, 1).tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(shares(2.0, None), torch.softmax(logits_V / 2, 0), atol=0.04, rtol=0)
    expected = torch.softmax(torch.tensor([3.0, 2.0]), 0)
    # Of all four the likeliest two have 0.90 together, of the likeliest three 0.91.
    for top_k, top_p in ((2, 1.0), (None, 0.89), (3, 0.905)):
        found = shares(1.0, top_k, top_p)
        torch.testing.assert_close(found[[1, 2]], expected, atol=0.04, rtol=0)
        assert found[[0, 3]].sum() == 0
