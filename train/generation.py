"""Continues a text with a saved run.

Shape suffixes: B batch (1), T tokens so far, S slots a token, U rows that the context reads, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kernels.gather import row_index
from model.engram import MemoryRows
from model.transformer import LanguageModel
from train.saved_run import SavedRun
from train.saved_tables import SavedTables


class ContextRows:
    """The rows that a growing context reads: each is read from the tables once, when a token first asks for it.

    Args:
        tables: where rows come from.
        device: of the model.
    """

    def __init__(self, tables: SavedTables, device: torch.device | str = "cpu") -> None:
        self._tables, self._device = tables, device
        modules = range(tables.addresses.num_modules)
        self._held = [torch.empty(0, dtype=torch.int64) for _ in modules]
        self._rows = [torch.empty(0, tables.dim, device=device) for _ in modules]

    def look_up(self, tokens_BT: Tensor, positions_BT: Tensor) -> list[MemoryRows]:
        """What the model reads for a context, an entry for each Engram layer. Rows it no longer reads are let go."""
        looked_up = []
        for module, rows_BTS in enumerate(self._tables.addresses.all_rows(tokens_BT, positions_BT)):
            unique_U, index_N = rows_BTS.flatten().unique(return_inverse=True)
            self._fetch(module, unique_U)
            index = row_index(index_N, len(unique_U)).to(self._device)
            looked_up.append(MemoryRows(self._rows[module], index))
        return looked_up

    def _fetch(self, module: int, unique_U: Tensor) -> None:
        held, old = self._held[module], self._rows[module]
        known_U = torch.isin(unique_U, held)
        rows_UD = old.new_empty(len(unique_U), old.shape[1])
        rows_UD[known_U.to(old.device)] = old[torch.searchsorted(held, unique_U[known_U]).to(old.device)]
        if not bool(known_U.all()):
            rows_UD[~known_U.to(old.device)] = self._tables.rows(module, unique_U[~known_U]).to(old.device)
        self._held[module], self._rows[module] = unique_U, rows_UD


class Predictor:
    """The logits of the token after a context: those of training's forward over that context, bit by bit.

    Args:
        model: in evaluation mode.
        tables: None without Engram.
        max_length: tokens that the model looks back over at most. What is left of a longer context counts as the
            rest of a document, as it does where training cuts one.
    """

    def __init__(self, model: LanguageModel, tables: SavedTables | None, max_length: int) -> None:
        self._model, self._max_length = model, max_length
        self._device = next(model.parameters()).device
        self._rows = ContextRows(tables, self._device) if tables else None

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> Tensor:
        """fp32 [V], on the CPU, after a context of at least one token."""
        tokens_BT = torch.tensor([list(ids[-self._max_length :])])
        positions_BT = torch.arange(tokens_BT.shape[1]).unsqueeze(0)
        memory = self._rows.look_up(tokens_BT, positions_BT) if self._rows else []
        hidden_BTD = self._model.model(tokens_BT.to(self._device), positions_BT.to(self._device), memory)
        # The head alone of what the forward computes needs no more than the last token.
        return self._model.lm_head(hidden_BTD[:, -1:])[0, 0].float().cpu()


def continuation(
    run: SavedRun, prompt: Sequence[int], *, num_tokens: int, temperature: float, top_k: int | None, seed: int
) -> Iterator[int]:
    """Up to `num_tokens` tokens after a prompt, one by one; ends early where the document does.

    Args:
        run: the checkpoint.
        prompt: token ids; for none, the text starts after an end of document.
        temperature: 0 takes the likeliest token.
        top_k: draws from this many likeliest tokens only; None from all.
        seed: of the draws.
    """
    tables = run.tables()
    predictor = Predictor(run.model(), tables, run.job.data.sequence_length)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt) or [run.tokenizer.eos_id]
    for _ in range(num_tokens):
        token = draw(predictor.logits(ids)[: run.tokenizer.vocab_size], temperature, top_k, generator)
        if token == run.tokenizer.eos_id:
            return
        ids.append(token)
        yield token


def draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A token id drawn from softmax(logits / temperature), among the `top_k` likeliest; the likeliest at 0."""
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        likeliest = logits_V.topk(top_k)
        chosen = torch.multinomial(torch.softmax(likeliest.values / temperature, dim=0), 1, generator=generator)
        return int(likeliest.indices[chosen])
    return int(torch.multinomial(torch.softmax(logits_V / temperature, dim=0), 1, generator=generator))
