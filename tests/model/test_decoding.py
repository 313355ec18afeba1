"""Decoding token by token gives the logits of the whole forward."""

import pytest
import torch
from torch import Tensor

from kernels.gather import row_index
from model.config import EngramConfig, RopeScalingConfig
from model.decoding import decoding
from model.engram import MemoryRows, ShortConvolution
from model.transformer import LanguageModel
from tests.model.tiny import ATTENTION, HYPER_CONNECTIONS, memories, positions, random_tokens, tiny_model

BATCH, LENGTH, DTYPE = 2, 20, torch.float64  # the convolution looks back 9 tokens

SCALED = ATTENTION.model_copy(update={"rope_scaling": RopeScalingConfig(factor=4.0, original_length=8, beta=2.0)})
KINDS = {
    "plain": {},
    "branches": {"hyper_connections": HYPER_CONNECTIONS},
    "no memory": {"engram": None},
    "scaled positions": {"attention": SCALED},
}


def part(memory: MemoryRows, tokens: slice, slots: int) -> MemoryRows:
    """The same rows, for some of the tokens."""
    index = memory.index.index_N.view(BATCH, LENGTH, slots)[:, tokens].flatten()
    return MemoryRows(memory.rows_UD, row_index(index, len(memory.rows_UD)))


@torch.no_grad()
def decoded(model: LanguageModel, tokens_BT: Tensor, prompt: int) -> Tensor:
    """Logits from the last of the first `prompt` tokens on: these go in at once, the others one by one."""
    positions_BT, whole = positions(LENGTH, batch=BATCH), memories(model, BATCH, LENGTH, DTYPE)
    slots = model.config.engram.lookups_per_token if model.config.engram else 0
    logits = []
    with decoding(model):
        for piece in (slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, LENGTH))):
            memory = [part(each, piece, slots) for each in whole]
            logits.append(model(tokens_BT[:, piece], positions_BT[:, piece], memory))
    return torch.cat(logits, dim=1)


@torch.no_grad()
def whole_forward(model: LanguageModel, tokens_BT: Tensor, length: int = LENGTH) -> Tensor:
    slots = model.config.engram.lookups_per_token if model.config.engram else 0
    memory = [part(each, slice(0, length), slots) for each in memories(model, BATCH, LENGTH, DTYPE)]
    return model(tokens_BT[:, :length], positions(length, batch=BATCH), memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [1, 2, 7, 12])
def test_one_by_one_equals_all_at_once(kind: str, prompt: int) -> None:
    model = tiny_model(DTYPE, **KINDS[kind]).eval()
    tokens_BT = random_tokens(BATCH, LENGTH)
    found = decoded(model, tokens_BT, prompt)
    torch.testing.assert_close(found, whole_forward(model, tokens_BT)[:, prompt - 1 :], rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("crossing", [False, True])
def test_texts_of_several_lengths_and_some_that_end(crossing: bool) -> None:
    """Each text as if it were alone, whatever stands for its padding; the first of three is dropped at the end."""
    memory = EngramConfig(layers=[0, 1], heads=2, rows_per_head=50, row_dim=4, cross_documents=crossing)
    model = tiny_model(DTYPE, engram=memory).eval()
    for convolution in (module for module in model.modules() if isinstance(module, ShortConvolution)):
        torch.nn.init.normal_(convolution.weight)
    slots, counts, new = memory.lookups_per_token, (3, 14, 9), 5
    tokens_BT = random_tokens(3, max(counts) + new)
    rows_UD = torch.randn(40, 4, dtype=DTYPE)
    index_BTS = torch.randint(0, 40, (3, max(counts) + new, slots))

    def rows(index_BTS: Tensor) -> list[MemoryRows]:
        return [MemoryRows(rows_UD, row_index(index_BTS.flatten(), 40))] * 2

    wanted = []
    for text, count in enumerate(counts):
        length = count + new
        logits = model(tokens_BT[text : text + 1, :length], torch.arange(length)[None], rows(index_BTS[text, :length]))
        wanted.append(logits[0, count - 1 :])
    padding_B = torch.tensor([max(counts) - count for count in counts])
    shifted = [
        (torch.cat([torch.full((pad,), 7), tokens_BT[text, : len(tokens_BT[text]) - pad]]),
         torch.cat([torch.randint(0, 40, (pad, slots)), index_BTS[text, : len(tokens_BT[text]) - pad]]))
        for text, pad in enumerate(padding_B.tolist())
    ]  # fmt: skip
    tokens_BT, index_BTS = (torch.stack(parts) for parts in zip(*shifted, strict=True))
    place_BT = torch.arange(tokens_BT.shape[1]) - padding_B[:, None]
    positions_BT = torch.where(place_BT < 0, place_BT + padding_B[:, None], place_BT)
    texts = [0, 1, 2]
    with decoding(model, padding_B) as batch:
        for step in range(new + 1):
            piece = slice(0, max(counts)) if step == 0 else slice(max(counts) + step - 1, max(counts) + step)
            if step == 3:
                texts = [2, 1]
                batch.keep(torch.tensor(texts))
            found = model(tokens_BT[texts][:, piece], positions_BT[texts][:, piece], rows(index_BTS[texts][:, piece]))
            for place, text in enumerate(texts):
                torch.testing.assert_close(found[place, 0], wanted[text][step], rtol=1e-9, atol=1e-9)


def test_nothing_is_left_behind() -> None:
    model = tiny_model(DTYPE).eval()
    tokens_BT = random_tokens(BATCH, LENGTH)
    before = whole_forward(model, tokens_BT)
    first = decoded(model, tokens_BT, 5)
    assert torch.equal(whole_forward(model, tokens_BT), before)
    assert torch.equal(decoded(model, tokens_BT, 5), first)
