"""A saved run as a model of lm-evaluation-harness (the `lm-eval` package, an optional extra).

What is asked is understood as the harness's own `HFLM` does, by the harness's own helpers.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    truncate_tokens,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from train.errors import UserError
from train.progress import Progress
from train.use.generation import TextBatch
from train.use.likelihood import Likelihood, Pair, suitable_tokens
from train.use.saved_run import SavedRun
from train.use.together import Asked, continue_together

_MAX_NEW_TOKENS = 256
_TAKEN = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "min_p": 0, "typical_p": 1, "length_penalty": 1}
"""Options that we have not, and the values at which they ask for nothing."""


class HarnessModel(TemplateLM):
    """What lm-evaluation-harness asks of a model, answered by a saved run.

    Where torch.distributed is initialised, every rank has the whole model, and answers its share of the requests.

    Args:
        run: the checkpoint.
        seed: of sampled texts. A request's samples depend on it, the request and their number, and on nothing else.
        batch_tokens: as for `Likelihood`.

    Example:
        >>> simple_evaluate(model=HarnessModel(SavedRun.open("runs/tiny")), tasks=["arc_easy"])
    """

    def __init__(self, run: SavedRun, *, seed: int = 0, batch_tokens: int | None = None) -> None:
        super().__init__()
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._seed, self._tables, self._model = seed, run.tables(), run.model()
        self._text = run.tokenizer
        self._max_length = run.job.data.longest
        self._device = torch.device("cpu")  # of what the harness itself computes
        self._likelihood = Likelihood(self._model, self._tables, self._max_length, batch_tokens)
        self._batch_tokens = batch_tokens or suitable_tokens(next(self._model.parameters()).device)
        engram = run.job.model.engram
        self._pad_id = self._text.pad_id if engram is None or engram.pad_id is None else engram.pad_id

    @property
    def eot_token_id(self) -> int:
        """The token that ends documents."""
        return self._text.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Identity of the tokenizer, for caches of requests."""
        return self._text.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; there are no special tokens to add."""
        return self._text.encode(string)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, stacked. Collective."""
        found = [torch.empty_like(tensor) for _ in range(self._world_size)]
        dist.all_gather(found, tensor)
        return torch.stack(found)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on rank `dst`. Collective."""
        found = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, found, dst)
        return found

    def barrier(self) -> None:
        """Waits for all ranks. Collective."""
        dist.barrier()

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts: every token is predicted once, windows are as long as in training."""
        windows: list[tuple[int, Pair]] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(
                ids, self.eot_token_id, max_seq_len=self._max_length, context_len=1
            ):
                context, asked = make_disjoint_window(window)
                windows.append((number, (list(context), list(asked))))
        totals = [0.0] * len(requests)
        for (number, _), (found, _) in zip(
            windows, self._scored([pair for _, pair in windows], disable_tqdm), strict=True
        ):
            totals[number] += found
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each request's continuation, and whether it is what greedy decoding gives."""
        answers = self._scored([(context, asked) for _, context, asked in requests], disable_tqdm)
        for (texts, *_), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _scored(self, pairs: list[Pair], quiet: bool) -> list[tuple[float, bool]]:
        with self._progress(len(pairs), "scoring", quiet) as bar:
            return self._likelihood.of(pairs, bar.advance)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues texts until a stop text, the end of the document or the number of tokens asked for."""
        repeats: Counter[int] = Counter()
        asked, stops = [], []
        for request in requests:
            context, options = request.args
            each, ends = self._asked(context, options, self._generator(request, repeats[id(request)]))
            repeats[id(request)] += 1  # the harness repeats a request by giving it again
            asked.append(each)
            stops.append(ends)
        with self._progress(len(requests), "generating", disable_tqdm) as bar:
            continue_together(
                lambda: TextBatch(self._model, self._tables, self._pad_id),
                asked,
                vocab_size=self._text.vocab_size,
                eos_id=self.eot_token_id,
                batch_tokens=self._batch_tokens,
                done=bar.advance,
            )
        answers: list[str] = []
        for request, each, ends in zip(requests, asked, stops, strict=True):
            answers.append(postprocess_generated_text(self._text.decode(each.found), ends, None))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def _progress(self, total: int, what: str, quiet: bool) -> Progress:
        return Progress(what, total, active=not quiet and self._rank == 0)

    def _generator(self, request: Any, repeat: int) -> torch.Generator:
        """Of the draws of a request's n-th answer."""
        named = [self._seed, request.task_name, request.doc_id, request.idx, *request.args, repeat]
        digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def _asked(self, context: str, options: dict[str, Any], generator: torch.Generator) -> tuple[Asked, list[str]]:
        """What a request asks for, and the texts that end its answer."""
        asked = self._understood(options)
        eos = str(self._text.backend.id_to_token(self.eot_token_id))
        stops = [stop for stop in handle_stop_sequences(asked["until"], eos=eos) if stop]

        def ends(found: list[int]) -> bool:
            text = self._text.decode(found)
            return any(stop in text for stop in stops)

        found = Asked(
            truncate_tokens(self.tok_encode(context), self._max_length - asked["max_gen_toks"]) or [self.eot_token_id],
            num_tokens=asked["max_gen_toks"],
            temperature=asked["temperature"] if asked["do_sample"] else 0.0,
            top_k=asked.get("top_k") or None,
            top_p=asked.get("top_p") or 1.0,
            generator=generator,
            ends=ends,
        )
        return found, stops

    def _understood(self, options: dict[str, Any]) -> dict[str, Any]:
        """Generation options under the harness's names and with its defaults.

        Raises:
            UserError: one is unknown, or leaves a prompt no room.
        """
        try:
            asked = dict(normalize_gen_kwargs(options, min(_MAX_NEW_TOKENS, self._max_length // 2)))
            asked["temperature"] = float(asked.get("temperature", 1.0 if asked["do_sample"] else 0.0))
        except (TypeError, ValueError) as error:
            raise UserError(f"generation options {options}: {error}; correct them in the task's file") from None
        for name in sorted(asked.keys() - _TAKEN):
            if asked[name] is not None and asked[name] != _NEUTRAL.get(name):
                raise UserError(
                    f"generation option {name}={asked[name]} is not supported (those that are: "
                    f"{', '.join(sorted(_TAKEN))}); take it out of the task's file"
                )
        if not 0 < asked["max_gen_toks"] < self._max_length:
            raise UserError(
                f"a task asks for {asked['max_gen_toks']} new tokens, but prompt and answer share the model's "
                f"{self._max_length} (data.sequence_length): give it generation_kwargs with a lower max_gen_toks"
            )
        return asked
