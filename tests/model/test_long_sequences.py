"""A training step on many tokens, in a process whose memory is measured."""

import resource
from multiprocessing.connection import Connection

import pytest
import torch

from model.config import RopeScalingConfig
from model.transformer import LanguageModel
from tests.model.tiny import ATTENTION, ENGRAM, memories, positions, random_tokens, tiny_model
from tests.warm import warm_context, warm_process


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(model: LanguageModel, *lengths: int) -> None:
    memory, tokens = memories(model, 1, sum(lengths)), random_tokens(1, sum(lengths))
    model(tokens, positions(*lengths), memory, tokens).backward()
    leaves = (*model.parameters(), *(table.rows_UD for table in memory))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


def measure(sender: Connection, *lengths: int) -> None:
    """Sends how much higher the peak is than after a step on few tokens."""
    torch.set_num_threads(1)
    attention = ATTENTION.model_copy(update={"heads": 1, "rope_scaling": RopeScalingConfig()})
    engram = ENGRAM.model_copy(update={"layers": [0]})
    model = tiny_model(attention=attention, engram=engram, num_layers=1, dense_layers=0)
    model.model.recompute = True
    step(model, 1024)
    before = peak()
    step(model, *lengths)
    sender.send(peak() - before)


@pytest.mark.parametrize("tokens", [16384, pytest.param(32768, marks=pytest.mark.long)])
def test_a_step_takes_memory_for_tokens_not_for_their_pairs(tokens: int) -> None:
    receiver, sender = warm_context().Pipe(duplex=False)
    process = warm_process(measure, sender, tokens // 2, tokens // 4, tokens // 4 - 1, 1)
    process.start()
    sender.close()
    risen = receiver.recv()
    process.join()
    # Half of one head's logits of the longest document, or of a dense mask of all tokens in bytes.
    assert 0 < risen < tokens**2 // 2
