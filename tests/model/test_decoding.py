"""Decoding token by token gives the logits of the whole forward."""

import pytest
import torch
from torch import Tensor

from kernels.gather import row_index
from model.config import RopeScalingConfig
from model.decoding import decoding
from model.engram import MemoryRows
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


def test_nothing_is_left_behind() -> None:
    model = tiny_model(DTYPE).eval()
    tokens_BT = random_tokens(BATCH, LENGTH)
    before = whole_forward(model, tokens_BT)
    first = decoded(model, tokens_BT, 5)
    assert torch.equal(whole_forward(model, tokens_BT), before)
    assert torch.equal(decoded(model, tokens_BT, 5), first)
