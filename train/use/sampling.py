"""Continues texts with the model at hand: a look at what it has learned."""

from collections.abc import Sequence
from contextlib import suppress
from typing import cast

import torch
import torch.distributed as dist

from model.transformer import LanguageModel
from offload.tables import EngramTables
from train.data.tokenization.tokenizer import Tokenizer
from train.engine import Engine
from train.evaluation import evaluating
from train.row_source import TrainedRows
from train.use.generation import Decoder, NotFinite, continuation


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
        max_length: the most tokens that the model looks back over.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
    """
    model, rows = cast(LanguageModel, engine.module), TrainedRows(tables) if tables else None

    def of_rank_0(token: int) -> int:
        # The next forward is collective: all ranks must continue the same text, whatever their rounding.
        told = torch.tensor(token, device=engine.device)
        dist.broadcast(told, src=0)
        return int(told)

    generator, texts = torch.Generator().manual_seed(seed), []
    # Compiled blocks would be compiled again: for a cache, and for its lengths.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            with Decoder(model, rows, max_length, forward=engine) as decoder:
                new = continuation(
                    decoder,
                    tokenizer,
                    ids,
                    num_tokens=num_tokens,
                    temperature=temperature,
                    top_k=None,
                    generator=generator,
                    agreed=of_rank_0,
                )
                with suppress(NotFinite):  # the loss, which is not finite either, shows it
                    for token in new:
                        ids.append(token)
                texts.append(tokenizer.decode(ids))
    return texts
