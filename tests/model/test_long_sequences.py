"""A training step on many tokens, in a process whose memory is measured."""

import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import resource, sys, torch
from model.config import RopeScalingConfig
from tests.model.tiny import memories, positions, random_tokens, tiny_model, ATTENTION, ENGRAM
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def step(*lengths):
    length = sum(lengths)
    memory, tokens = memories(model, 1, length), random_tokens(1, length)
    model(tokens, positions(*lengths), memory, tokens).backward()
    leaves = (*model.parameters(), *(table.rows_UD for table in memory))
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)
attention = ATTENTION.model_copy(update={"heads": 1, "rope_scaling": RopeScalingConfig()})
engram = ENGRAM.model_copy(update={"layers": [0]})
model = tiny_model(attention=attention, engram=engram, num_layers=1, dense_layers=0)
model.model.recompute = True
step(1024)
before = peak()
step(*map(int, sys.argv[1:]))
print(peak() - before)
"""


@pytest.mark.parametrize("tokens", [16384, pytest.param(32768, marks=pytest.mark.long)])
def test_a_step_takes_memory_for_tokens_not_for_their_pairs(tokens: int) -> None:
    lengths = (tokens // 2, tokens // 4, tokens // 4 - 1, 1)
    done = subprocess.run(
        [sys.executable, "-c", STEP, *map(str, lengths)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Half of one head's logits of the longest document, or of a dense mask of all tokens in bytes.
    assert int(done.stdout) < tokens**2 // 2
