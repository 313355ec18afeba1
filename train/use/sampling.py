"""Continues texts with the model at hand: a look at what it has learned."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from model.balance import reset_counts
from offload.plan.plan import Tokens
from offload.tables import EngramTables
from train.data.tokenizer import Tokenizer
from train.engine import Engine
from train.evaluation import memory_of


@torch.no_grad()
def continue_texts(
    engine: Engine,
    tables: EngramTables | None,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    num_tokens: int,
    temperature: float,
    max_length: int,
    seed: int,
) -> list[str]:
    """The prompts, each with up to `num_tokens` more tokens; a text ends early where its document does. Collective.

    Args:
        max_length: tokens that the model looks back over at most.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
    """
    engine.module.eval()
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for prompt in prompts:
        # The model needs a token to start from; of an empty prompt, none but the one that ends documents is neutral.
        ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
        for _ in range(num_tokens):
            token = _next_token(engine, tables, ids[-max_length:], temperature, generator)
            if token == tokenizer.eos_id:
                break
            ids.append(token)
        texts.append(tokenizer.decode(ids))
    engine.module.train()
    reset_counts(engine.module)
    return texts


def _next_token(
    engine: Engine, tables: EngramTables | None, ids: Sequence[int], temperature: float, generator: torch.Generator
) -> int:
    tokens_BT = torch.tensor([ids])
    positions_BT = torch.arange(len(ids)).unsqueeze(0)
    rows = tables.look_up([Tokens(tokens_BT, positions_BT)]) if tables else None
    logits_BTV = engine(tokens_BT.to(engine.device), positions_BT.to(engine.device), memory_of(rows, 0))
    token = _draw(logits_BTV[0, -1].float().cpu(), temperature, generator).to(engine.device)
    # The next forward is collective: all ranks must continue the same text, whatever their rounding.
    dist.broadcast(token, src=0)
    return int(token)


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_V.argmax()
    return torch.multinomial(torch.softmax(logits_V / temperature, dim=0), 1, generator=generator)[0]
